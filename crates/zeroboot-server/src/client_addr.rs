//! Whose request it is: the peer, or what a proxy says about it if we were told to believe that proxy.

use std::net::IpAddr;

use axum::http::HeaderMap;
use ipnet::IpNet;

const FORWARDED_FOR: &str = "x-forwarded-for";

/// The client's address. `peer` is `None` on a Unix socket: its clients are believed if any proxy is configured.
pub(crate) fn client_address(peer: Option<IpAddr>, headers: &HeaderMap, trusted: &[IpNet]) -> Option<IpAddr> {
    let believed = |ip: &IpAddr| trusted.iter().any(|network| network.contains(ip));
    let peer = peer.map(|ip| ip.to_canonical());
    let trust_peer = peer.map_or(!trusted.is_empty(), |ip| believed(&ip));
    if !trust_peer {
        return peer;
    }
    // Each proxy appends whom it saw, so the list is read from its end until someone is not one of ours. A line that is
    // not text ends it as any other nonsense: a proxy may have appended to it.
    let lines: Vec<&str> = headers.get_all(FORWARDED_FOR).iter().map(|value| value.to_str().unwrap_or("")).collect();
    let mut client = peer;
    for word in lines.iter().rev().flat_map(|line| line.rsplit(',')) {
        let Some(ip) = parse(word.trim()) else { break };
        client = Some(ip);
        if !believed(&ip) {
            break;
        }
    }
    client
}

/// An address, with or without a port.
fn parse(word: &str) -> Option<IpAddr> {
    let bare = word.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(word);
    let ip = bare.parse::<IpAddr>().ok().or_else(|| word.parse::<std::net::SocketAddr>().ok().map(|with| with.ip()))?;
    Some(ip.to_canonical())
}

/// What a limit counts as one client: an IPv4 address, or the /64 that one IPv6 customer gets.
pub(crate) fn limit_name(address: Option<IpAddr>) -> u128 {
    match address {
        None => 0,
        Some(IpAddr::V4(ip)) => ip.to_ipv6_mapped().to_bits(),
        Some(IpAddr::V6(ip)) => ip.to_bits() >> 64 << 64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(peer: &str, forwarded: &[&str], trusted: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for line in forwarded {
            headers.append(FORWARDED_FOR, axum::http::HeaderValue::from_bytes(line.as_bytes()).unwrap());
        }
        let trusted: Vec<IpNet> = trusted.iter().map(|network| network.parse().unwrap()).collect();
        client_address(peer.parse().ok(), &headers, &trusted).map_or("none".into(), |ip| ip.to_string())
    }

    #[test]
    fn a_header_from_anyone_else_is_not_believed() {
        assert_eq!(address("9.9.9.9", &["1.1.1.1"], &[]), "9.9.9.9");
        assert_eq!(address("9.9.9.9", &["1.1.1.1"], &["10.0.0.0/8"]), "9.9.9.9");
        assert_eq!(address("", &["1.1.1.1"], &[]), "none");
    }

    #[test]
    fn behind_proxies_the_first_address_that_is_not_theirs_counts() {
        let ours = &["10.0.0.0/8"];
        assert_eq!(address("10.0.0.1", &["1.1.1.1"], ours), "1.1.1.1");
        assert_eq!(address("10.0.0.1", &["6.6.6.6, 1.1.1.1, 10.0.0.2"], ours), "1.1.1.1");
        assert_eq!(address("10.0.0.1", &["6.6.6.6", "1.1.1.1:443 , 10.0.0.2"], ours), "1.1.1.1");
        assert_eq!(address("::ffff:10.0.0.1", &["[2001:db8::1]:443"], ours), "2001:db8::1");
        assert_eq!(address("10.0.0.1", &[], ours), "10.0.0.1");
        assert_eq!(address("10.0.0.1", &["6.6.6.6, nonsense"], ours), "10.0.0.1");
        assert_eq!(address("10.0.0.1", &["6.6.6.6", "ÿ, 1.1.1.1"], ours), "10.0.0.1");
        assert_eq!(address("", &["1.1.1.1"], ours), "1.1.1.1");
    }

    #[test]
    fn one_ipv6_customer_is_one_client() {
        let name = |text: &str| limit_name(text.parse().ok());
        assert_eq!(name("2001:db8::1"), name("2001:db8::ffff"));
        assert_ne!(name("2001:db8::1"), name("2001:db8:0:1::1"));
        assert_ne!(name("1.1.1.1"), name("1.1.1.2"));
    }
}
