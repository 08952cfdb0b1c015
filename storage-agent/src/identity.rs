//! From a volume's permanent id to what an initiator and a guest see: unit serial, WWN, guest serial (rule 1, F2).
//! Pure; where the id comes from is the adapter's matter.

use serde::{Deserialize, Serialize};
use tether_proto::{ByteSize, Serial, Wwn};
use uuid::Uuid;

/// The namespace of our name-based UUIDs (RFC 9562 section 5.5). It never changes: every volume's WWN hangs on it.
const NAMESPACE: Uuid = Uuid::from_u128(0x7b4f_6a0e_55c1_4c39_9a53_74d1_0e2f_8b16);

/// What LIO puts before 25 digits of the unit serial: NAA 6, and the OUI of linux-iscsi.org
/// (`spc_gen_naa_6h_vendor_specific` in the kernel's target_core_spc.c).
const LIO_NAA_PREFIX: &str = "6001405";

/// How a volume's space is had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Provisioning {
    /// All at once.
    Thick,
    /// As it is written.
    Thin,
}

impl Provisioning {
    /// The word for people.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Thick => "thick",
            Self::Thin => "thin",
        }
    }
}

/// A volume that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeIdentity {
    /// The permanent id: of an LV in LVM's spelling, `xxxxxx-xxxx-xxxx-xxxx-xxxx-xxxx-xxxxxx`; of a file the UUID that
    /// was made with it.
    pub(crate) uuid: String,
    /// The size.
    pub(crate) size: ByteSize,
}

impl VolumeIdentity {
    /// The SCSI unit serial: 32 hexadecimal digits. LVM's UUIDs have letters that are no hexadecimal digits, and LIO
    /// would leave those out of the WWN; a name-based UUID keeps all of the id.
    pub(crate) fn unit_serial(&self) -> String {
        Uuid::new_v5(&NAMESPACE, self.uuid.as_bytes()).simple().to_string()
    }

    /// The WWN that LIO makes of the unit serial.
    pub(crate) fn wwn(&self) -> Wwn {
        let text = format!("{LIO_NAA_PREFIX}{}", &self.unit_serial()[..25]);
        // 7 + 25 hexadecimal digits that begin with a 6 are always a WWN.
        text.parse().unwrap_or_else(|_| unreachable!("{text} is a WWN"))
    }

    /// The serial that a guest sees, 20 hexadecimal digits.
    pub(crate) fn serial(&self) -> Serial {
        let text = &self.unit_serial()[..20];
        text.parse().unwrap_or_else(|_| unreachable!("{text} is a serial"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(uuid: &str) -> VolumeIdentity {
        VolumeIdentity { uuid: uuid.into(), size: ByteSize::try_from(1).unwrap() }
    }

    /// F2: the same volume has the same names for ever. These values must never change between versions.
    #[test]
    fn f2_the_wwn_is_a_function_of_the_uuid() {
        let one = identity("Yx7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp");
        assert_eq!(one.wwn().to_string(), format!("6001405{}", &one.unit_serial()[..25]));
        assert_eq!(one.unit_serial(), identity("Yx7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp").unit_serial());
        assert!(one.unit_serial().starts_with(one.serial().as_str()));
    }

    #[test]
    fn f2_uuids_that_differ_only_in_letters_beyond_f_have_other_wwns() {
        let wwns: std::collections::HashSet<String> = ["g", "h", "G", "z"]
            .iter()
            .map(|letter| {
                identity(&format!("Yx7c2{letter}-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp")).wwn().to_string()
            })
            .collect();
        assert_eq!(wwns.len(), 4);
    }
}
