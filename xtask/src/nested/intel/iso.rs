//! A CD image that a BIOS boots by ISOLINUX: the one way to hand Bochs a kernel, an initial file system and parameters.
//!
//! Formats: ECMA-119 (ISO 9660), El Torito, and the boot information table of ISOLINUX. One directory, names in 8.3.

/// Bytes in a sector.
const SECTOR: usize = 2048;
/// The volume descriptor, the boot record, the terminator, the catalogue, two path tables, the directory.
const VOLUME: usize = 16;
const BOOT_RECORD: usize = 17;
const TERMINATOR: usize = 18;
const CATALOGUE: usize = 19;
const PATHS_LITTLE: usize = 20;
const PATHS_BIG: usize = 21;
const DIRECTORY: usize = 22;
const FIRST_FILE: usize = 23;

/// An image of these files. The first is the boot loader, `isolinux.bin`; names are upper case and at most 8.3.
pub(super) fn image(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut at = FIRST_FILE;
    let mut root = [record(b"\0", DIRECTORY, SECTOR, true), record(b"\x01", DIRECTORY, SECTOR, true)].concat();
    let mut placed = Vec::new();
    // ISOLINUX reads the directory in any order.
    for (name, bytes) in files {
        root.extend(record(format!("{name};1").as_bytes(), at, bytes.len(), false));
        placed.push((at, *bytes));
        at += bytes.len().div_ceil(SECTOR);
    }
    assert!(root.len() <= SECTOR, "one sector holds the directory");

    let mut disk = vec![0; at * SECTOR];
    let mut put = |sector: usize, offset: usize, bytes: &[u8]| {
        disk[sector * SECTOR + offset..][..bytes.len()].copy_from_slice(bytes);
    };
    let both = |value: u32| [value.to_le_bytes(), value.to_be_bytes()].concat();
    let both16 = |value: u16| [value.to_le_bytes(), value.to_be_bytes()].concat();

    put(VOLUME, 0, b"\x01CD001\x01");
    put(VOLUME, 8, &[b' '; 64]);
    put(VOLUME, 80, &both(at as u32));
    put(VOLUME, 120, &both16(1));
    put(VOLUME, 124, &both16(1));
    put(VOLUME, 128, &both16(SECTOR as u16));
    // One path: the root's.
    let path = |sector: [u8; 4], parent: [u8; 2]| [&[1, 0][..], &sector, &parent, &[0, 0]].concat();
    put(VOLUME, 132, &both(10));
    put(VOLUME, 140, &(PATHS_LITTLE as u32).to_le_bytes());
    put(VOLUME, 148, &(PATHS_BIG as u32).to_be_bytes());
    put(PATHS_LITTLE, 0, &path((DIRECTORY as u32).to_le_bytes(), 1_u16.to_le_bytes()));
    put(PATHS_BIG, 0, &path((DIRECTORY as u32).to_be_bytes(), 1_u16.to_be_bytes()));
    put(VOLUME, 156, &record(b"\0", DIRECTORY, SECTOR, true));
    put(VOLUME, 881, &[1]);
    put(BOOT_RECORD, 0, b"\0CD001\x01EL TORITO SPECIFICATION");
    put(BOOT_RECORD, 71, &(CATALOGUE as u32).to_le_bytes());
    put(TERMINATOR, 0, b"\xffCD001\x01");

    // A validation entry, whose words add up to 0, and one that says: 4 sectors of 512 bytes, no emulation.
    let mut entry = [0; 32];
    (entry[0], entry[30], entry[31]) = (1, 0x55, 0xaa);
    let sum = words(&entry, 2).fold(0_u16, |sum, word| sum.wrapping_add(word as u16));
    entry[28..30].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
    put(CATALOGUE, 0, &entry);
    put(CATALOGUE, 32, &[0x88, 0, 0, 0, 0, 0, 4, 0]);
    put(CATALOGUE, 40, &(FIRST_FILE as u32).to_le_bytes());
    put(DIRECTORY, 0, &root);
    for (sector, bytes) in &placed {
        put(*sector, 0, bytes);
    }
    // The boot information table: where the volume and the loader are, its length, and the sum of what follows byte 64.
    if let Some((sector, loader)) = placed.first() {
        let sum = words(loader.get(64..).unwrap_or_default(), 4).fold(0_u32, u32::wrapping_add);
        let table = [VOLUME as u32, *sector as u32, loader.len() as u32, sum].map(u32::to_le_bytes);
        put(*sector, 8, table.as_flattened());
    }
    disk
}

/// A directory's entry.
fn record(name: &[u8], sector: usize, length: usize, directory: bool) -> Vec<u8> {
    let mut record = vec![0; 33];
    record.extend(name);
    // Its length is even.
    record.resize(record.len().next_multiple_of(2), 0);
    let size = u8::try_from(record.len()).expect("8.3 names are short");
    record[0] = size;
    for (at, value) in [(2, sector as u32), (10, length as u32)] {
        record[at..at + 4].copy_from_slice(&value.to_le_bytes());
        record[at + 4..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    record[25] = if directory { 2 } else { 0 };
    (record[28], record[31]) = (1, 1);
    record[32] = name.len() as u8;
    record
}

/// Words of `size` bytes, the last filled with zeros.
fn words(bytes: &[u8], size: usize) -> impl Iterator<Item = u32> {
    bytes.chunks(size).map(|chunk| chunk.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's own reader is the judge in the lane itself; here, what ISOLINUX and a BIOS look at.
    #[test]
    fn an_image_says_where_its_files_are() {
        let loader: Vec<u8> = (0..5000_u32).map(|i| i as u8).collect();
        let disk = image(&[("ISOLINUX.BIN", &loader), ("A.CFG", b"hello")]);
        assert_eq!(disk.len() % SECTOR, 0);
        let le = |at: usize| u32::from_le_bytes(disk[at..at + 4].try_into().unwrap()) as usize;
        // The catalogue names the loader's sector, and its first entry adds up to 0.
        let catalogue = le(BOOT_RECORD * SECTOR + 71) * SECTOR;
        assert_eq!(words(&disk[catalogue..][..32], 2).sum::<u32>() & 0xffff, 0);
        let begin = le(catalogue + 40) * SECTOR;
        assert_eq!(&disk[begin + 64..][..loader.len() - 64], &loader[64..]);
        assert_eq!((le(begin + 8), le(begin + 12) * SECTOR, le(begin + 16)), (VOLUME, begin, loader.len()));
        let sum = loader[64..].chunks(4).map(|c| c.iter().rev().fold(0_u32, |w, b| w << 8 | u32::from(*b)));
        assert_eq!(le(begin + 20), sum.fold(0_u32, u32::wrapping_add) as usize);
        // The second file, by the directory that the volume descriptor names.
        let root = &disk[le(VOLUME * SECTOR + 156 + 2) * SECTOR..][..SECTOR];
        let name = root.windows(7).position(|w| w == b"A.CFG;1").unwrap();
        let entry = &root[name - 33..];
        let at = |offset: usize| u32::from_le_bytes(entry[offset..offset + 4].try_into().unwrap()) as usize;
        assert_eq!(&disk[at(2) * SECTOR..][..at(10)], b"hello");
    }
}
