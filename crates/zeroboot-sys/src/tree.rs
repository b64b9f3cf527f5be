//! Rewrites a seccomp program from a chain of comparisons into a decision tree.
//!
//! seccompiler compares the system call's number with each rule's in turn. At installation the kernel runs the program
//! once for every number there is to learn which are always allowed, so a chain of a thousand instructions costs the
//! better part of a millisecond at each fork; a tree answers each number in about eight steps.
//!
//! The rewriting follows the program for one number out of every range that its comparisons can tell apart. It knows
//! the instructions that seccompiler writes ahead of the rules on arguments, and refuses any other.

use std::collections::BTreeSet;

use seccompiler::{BpfProgram, sock_filter};

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const JUMP_ABOVE: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K

/// Of `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// What becomes of the numbers of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaf {
    /// This answer.
    Return(u32),
    /// It depends on the arguments: the rest of the program from this instruction on.
    Rules(usize),
}

/// The same answers by fewer steps. `None` for a program that is not of seccompiler's shape.
pub(crate) fn decision_tree(chain: &[sock_filter]) -> Option<BpfProgram> {
    // Load the architecture, compare, kill, load the number: kept as they are.
    let prologue = chain.get(..4)?;
    let [arch, compare, kill, number] = prologue else { return None };
    let expected = arch.code == LOAD
        && arch.k == ARCHITECTURE
        && (compare.code, compare.jt, compare.jf) == (JUMP_EQUAL, 1, 0)
        && kill.code == RETURN
        && number.code == LOAD
        && number.k == NUMBER;
    if !expected {
        return None;
    }

    // An equality tells its constant from both neighbours: a range begins there and one behind it.
    let mut starts = vec![0u32];
    for instruction in chain.get(4..)?.iter().filter(|instruction| instruction.code == JUMP_EQUAL) {
        // Constants of rules on arguments are among them: more ranges than needed, which then fall together.
        starts.extend([instruction.k, instruction.k.saturating_add(1)]);
    }
    starts.sort_unstable();
    starts.dedup();
    let mut ranges: Vec<(u32, Leaf)> = Vec::new();
    for start in starts {
        let leaf = follow(chain, start)?;
        if ranges.last().is_none_or(|(_, last)| *last != leaf) {
            ranges.push((start, leaf));
        }
    }

    let mut program = prologue.to_vec();
    let mut jumps = Vec::new();
    grow(&ranges, &mut program, &mut jumps)?;
    // The rules on arguments follow the tree.
    for (at, start) in jumps {
        program.get_mut(at)?.k = u32::try_from(program.len() - at - 1).ok()?;
        copy_reachable(chain, start, &mut program)?;
    }
    Some(program)
}

/// The end of the chain for system call `number`.
fn follow(chain: &[sock_filter], number: u32) -> Option<Leaf> {
    let mut at = 4;
    loop {
        let instruction = chain.get(at)?;
        let skip = match instruction.code {
            JUMP => instruction.k as usize,
            JUMP_EQUAL if number == instruction.k => usize::from(instruction.jt),
            JUMP_EQUAL => usize::from(instruction.jf),
            RETURN => return Some(Leaf::Return(instruction.k)),
            // Arguments are loaded: from here on it is no matter of the number alone.
            LOAD if instruction.k > ARCHITECTURE => return Some(Leaf::Rules(at)),
            _ => return None,
        };
        at += 1 + skip;
    }
}

/// Appends what can be reached from `start`: the rules of one system call. Nothing there may need the number.
fn copy_reachable(chain: &[sock_filter], start: usize, program: &mut BpfProgram) -> Option<()> {
    // Jumps only lead forward: the smallest that was not looked at yet has no predecessor behind it.
    let mut reached = BTreeSet::from([start]);
    let mut next = Some(start);
    while let Some(at) = next {
        let instruction = chain.get(at)?;
        match instruction.code {
            RETURN => {}
            JUMP => _ = reached.insert(at + 1 + instruction.k as usize),
            JUMP_EQUAL | JUMP_AT_LEAST | JUMP_ABOVE => {
                reached.extend([instruction.jt, instruction.jf].map(|skip| at + 1 + usize::from(skip)));
            }
            LOAD if instruction.k > ARCHITECTURE => _ = reached.insert(at + 1),
            AND => _ = reached.insert(at + 1),
            _ => return None,
        }
        next = reached.range(at + 1..).next().copied();
    }
    for at in &reached {
        let mut instruction = chain.get(*at)?.clone();
        // Fewer instructions lie between than did.
        let skip = |old: usize| reached.range(at + 1..at + 1 + old).count();
        match instruction.code {
            JUMP => instruction.k = u32::try_from(skip(instruction.k as usize)).ok()?,
            JUMP_EQUAL | JUMP_AT_LEAST | JUMP_ABOVE => {
                instruction.jt = u8::try_from(skip(instruction.jt.into())).ok()?;
                instruction.jf = u8::try_from(skip(instruction.jf.into())).ok()?;
            }
            _ => {}
        }
        program.push(instruction);
    }
    Some(())
}

/// Appends the tree of `ranges`; `jumps` are its instructions that must still be led to a block.
fn grow(ranges: &[(u32, Leaf)], program: &mut BpfProgram, jumps: &mut Vec<(usize, usize)>) -> Option<()> {
    let op = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    match ranges {
        [] => None,
        [(_, Leaf::Return(answer))] => {
            program.push(op(RETURN, 0, 0, *answer));
            Some(())
        }
        [(_, Leaf::Rules(block))] => {
            jumps.push((program.len(), *block));
            program.push(op(JUMP, 0, 0, 0));
            Some(())
        }
        _ => {
            let (lower, upper) = ranges.split_at(ranges.len() / 2);
            let split = program.len();
            // A conditional jump reaches 255 instructions only.
            program.push(op(JUMP_AT_LEAST, 0, 1, upper.first()?.0));
            program.push(op(JUMP, 0, 0, 0));
            grow(lower, program, jumps)?;
            let far = program.len() - split - 2;
            program.get_mut(split + 1)?.k = u32::try_from(far).ok()?;
            grow(upper, program, jumps)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

    use std::{collections::HashMap, sync::LazyLock};

    use proptest::prelude::*;
    use seccompiler::TargetArch;

    use super::*;

    const POLICIES: [&str; 4] = [
        include_str!("../../../policy/process-sandbox.json"),
        include_str!("../../../policy/process-uncounted.json"),
        include_str!("../../../policy/vm-worker.json"),
        include_str!("../../../policy/vm-restore.json"),
    ];
    const X86_64: u32 = 0xc000_003e;

    static CHAINS: LazyLock<Vec<BpfProgram>> = LazyLock::new(|| {
        let compile = |json: &&str| -> HashMap<String, BpfProgram> {
            seccompiler::compile_from_json(json.as_bytes(), TargetArch::x86_64).unwrap()
        };
        POLICIES.iter().flat_map(|json| compile(json).into_values()).collect()
    });

    /// What the kernel's interpreter answers, and in how many steps.
    fn run(program: &[sock_filter], arch: u32, number: u32, args: [u64; 6]) -> (u32, usize) {
        let (mut at, mut accumulator, mut steps) = (0, 0u32, 0);
        loop {
            let op = &program[at];
            at += 1;
            steps += 1;
            let mut branch = |taken: bool| at += usize::from(if taken { op.jt } else { op.jf });
            match op.code {
                LOAD => {
                    accumulator = match op.k {
                        NUMBER => number,
                        ARCHITECTURE => arch,
                        offset => {
                            let (arg, high) = ((offset - 16) / 8, (offset - 16) % 8 == 4);
                            (args[arg as usize] >> if high { 32 } else { 0 }) as u32
                        }
                    }
                }
                AND => accumulator &= op.k,
                JUMP => at += op.k as usize,
                JUMP_EQUAL => branch(accumulator == op.k),
                JUMP_AT_LEAST => branch(accumulator >= op.k),
                JUMP_ABOVE => branch(accumulator > op.k),
                RETURN => return (op.k, steps),
                other => panic!("no instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn every_policy_becomes_a_tree_that_answers_each_number_in_few_steps() {
        for chain in CHAINS.iter() {
            let tree = decision_tree(chain).unwrap();
            for number in (0..2048).chain([1 << 30, (1 << 30) | 1, u32::MAX - 1, u32::MAX]) {
                for arch in [X86_64, 0x4000_0003, 0] {
                    let (answer, _) = run(chain, arch, number, [0; 6]);
                    let (same, steps) = run(&tree, arch, number, [0; 6]);
                    assert_eq!(answer, same, "number {number} of architecture {arch:#x}");
                    // The prologue, twice the tree's depth, and the rules on arguments. The lists of socket options
                    // and of ioctls are the longest; neither call is one that programs make often.
                    let most = if [54, 16].contains(&number) { 140 } else { 60 };
                    assert!(steps <= most, "{steps} steps for number {number}");
                }
            }
            assert!(tree.len() <= chain.len() + 16, "{} instructions were {}", tree.len(), chain.len());
        }
    }

    /// The arguments that a rule wants, where it says; the others from `fill`.
    fn arguments(rule: &serde_json::Value, fill: u64) -> [u64; 6] {
        let mut args = [fill; 6];
        let mut unequal = [false; 6];
        for condition in rule["args"].as_array().into_iter().flatten() {
            let at = condition["index"].as_u64().unwrap() as usize;
            let value = condition["val"].as_u64().unwrap();
            match &condition["op"] {
                op if op == "ne" => unequal[at] = true,
                op if op == "eq" || op.get("masked_eq").is_some() => args[at] = value,
                other => panic!("no operator {other}"),
            }
        }
        for at in (0..6).filter(|at| unequal[*at]) {
            // `fill` may be what the rule refuses; then another filling tells more.
            args[at] = if fill == 0 { 0xabcd } else { fill };
        }
        args
    }

    /// Every rule admits something that none of the others does.
    #[test]
    fn every_rule_of_every_policy_changes_an_answer() {
        let mut rules = 0;
        for json in POLICIES {
            let policy: serde_json::Value = serde_json::from_str(json).unwrap();
            let compile = |policy: &serde_json::Value, name: &str| -> Vec<sock_filter> {
                let bytes = serde_json::to_vec(policy).unwrap();
                seccompiler::compile_from_json(bytes.as_slice(), TargetArch::x86_64).unwrap().remove(name).unwrap()
            };
            for (name, filter) in policy.as_object().unwrap() {
                let list = filter["filter"].as_array().unwrap();
                let with = compile(&policy, name);
                // Also all that any rule of the filter compares with, and its neighbours.
                let mut fillings = vec![0u64];
                for condition in list.iter().filter_map(|rule| rule["args"].as_array()).flatten() {
                    let value = condition["val"].as_u64().unwrap();
                    fillings.extend([value, value.wrapping_add(1)]);
                }
                for (at, rule) in list.iter().enumerate() {
                    let mut less = policy.clone();
                    less[name]["filter"].as_array_mut().unwrap().remove(at);
                    let without = compile(&less, name);
                    // The number of its call: the one that a filter with nothing but that call answers otherwise.
                    let mut alone = policy.clone();
                    alone[name]["filter"] = serde_json::json!([{ "syscall": rule["syscall"] }]);
                    let alone = compile(&alone, name);
                    let answer = |number| run(&alone, X86_64, number, [0; 6]).0;
                    let number = (0..1024).find(|number| answer(*number) != answer(2000)).unwrap();
                    let differs = fillings.iter().any(|fill| {
                        let args = arguments(rule, *fill);
                        run(&with, X86_64, number, args).0 != run(&without, X86_64, number, args).0
                    });
                    assert!(differs, "{name} answers the same without {rule}");
                    rules += 1;
                }
            }
        }
        assert!(rules > 300, "{rules}");
    }

    #[test]
    fn what_is_not_seccompilers_is_refused() {
        let chain = CHAINS[0].clone();
        assert!(decision_tree(&[]).is_none());
        assert!(decision_tree(&chain[1..]).is_none());
        // Cut off in the middle: its jumps lead nowhere.
        assert!(decision_tree(&chain[..chain.len() - 1]).is_none());
        let mut store = chain.clone();
        store[4].code = 0x02; // BPF_ST
        assert!(decision_tree(&store).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Arguments from among the constants that any policy compares with, their neighbours, and any others.
        #[test]
        fn the_tree_answers_as_the_chain(
            number in 0u32..512,
            picks in prop::array::uniform6((any::<prop::sample::Index>(), -1i64..=1, any::<bool>(), any::<u64>())),
        ) {
            for chain in CHAINS.iter() {
                let constants: Vec<u32> = chain.iter().map(|op| op.k).collect();
                let args = picks.map(|(index, off, near, other)| {
                    if near { u64::from(*index.get(&constants)).wrapping_add_signed(off) } else { other }
                });
                let tree = decision_tree(chain).unwrap();
                prop_assert_eq!(run(chain, X86_64, number, args).0, run(&tree, X86_64, number, args).0);
            }
        }
    }
}
