//! The header of a qcow2 file that we made ourselves, checked (QEMU's docs/interop/qcow2.txt). Bytes in, size out; nothing
//! is read here. This says whether a file that is recorded as qcow2 is still what we made. It never decides what a file
//! is (F4): a raw volume is never looked into.

/// How much of the file's beginning is needed, in bytes.
pub const HEADER_LENGTH: usize = 80;
const MAGIC: &[u8] = b"QFI\xfb";
const VERSION: u32 = 3;
/// "Incompatible features", bit 2: the guest's bytes are in another file.
const EXTERNAL_DATA_FILE: u64 = 1 << 2;

/// The size that the guest sees, in bytes.
///
/// # Errors
/// What is wrong with the header, to follow the file's name: another magic or version, or a lead to another file.
pub fn virtual_size(header: &[u8; HEADER_LENGTH]) -> Result<u64, &'static str> {
    let number = |place: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[place..place + 8]);
        u64::from_be_bytes(bytes)
    };
    if &header[..4] != MAGIC {
        return Err("has no qcow2 header");
    }
    // The version stands in the lower half, behind the magic.
    if number(0) & u64::from(u32::MAX) != u64::from(VERSION) {
        return Err("is not of version 3 of qcow2");
    }
    if number(8) != 0 {
        return Err("has a backing file");
    }
    if number(72) & EXTERNAL_DATA_FILE != 0 {
        return Err("has an external data file");
    }
    Ok(number(24))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What qemu-img 7.2 writes for a file of 1 GiB, up to the incompatible features.
    fn header() -> [u8; HEADER_LENGTH] {
        let mut header = [0; HEADER_LENGTH];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header[23] = 16;
        header[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        header
    }

    #[test]
    fn f4_only_a_header_as_we_make_it_is_taken() {
        assert_eq!(virtual_size(&header()), Ok(1 << 30));
        // A file that was not closed well is dirty (bit 0), and still ours.
        let mut dirty = header();
        dirty[79] = 1;
        assert_eq!(virtual_size(&dirty), Ok(1 << 30));
        for (place, value, problem) in [
            (0, 0, "has no qcow2 header"),
            (7, 2, "is not of version 3 of qcow2"),
            (15, 104, "has a backing file"),
            (79, 4, "has an external data file"),
        ] {
            let mut header = header();
            header[place] = value;
            assert_eq!(virtual_size(&header), Err(problem));
        }
    }
}
