//! How a guest sees a disk: options from the wire, checked against each other.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ParseError, Serial, wire};

macro_rules! option_enum {
    ($(#[$doc:meta])* $name:ident, $field:literal, $wire:ident, { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// libvirt's word for it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// `None` when the wire leaves it to the agent.
            fn from_wire(number: i32) -> Result<Option<Self>, ParseError> {
                match wire::$wire::try_from(number) {
                    Ok(wire::$wire::Unspecified) => Ok(None),
                    $(Ok(wire::$wire::$variant) => Ok(Some(Self::$variant)),)+
                    Err(_) => Err(ParseError::new($field, "is a number that this agent does not know", &number.to_string())),
                }
            }
        }

        impl From<$name> for wire::$wire {
            fn from(value: $name) -> Self {
                match value { $($name::$variant => Self::$variant),+ }
            }
        }

        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(ParseError::new($field, concat!("must be one of:" $(, " ", $text)+), text)),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

option_enum!(
    /// The bus on which the guest sees the disk.
    DiskBus, "bus", DiskBus, {
        /// virtio-blk, a PCI device of its own.
        Virtio = "virtio",
        /// A disk on the domain's virtio-scsi controller.
        Scsi = "scsi",
    }
);

option_enum!(
    /// libvirt's `<driver cache=…>`.
    DiskCache, "cache", DiskCache, {
        /// `O_DIRECT`, the guest flushes.
        None = "none",
        /// Page cache, each write synced.
        Writethrough = "writethrough",
        /// Page cache, the guest flushes.
        Writeback = "writeback",
        /// `O_DIRECT` and each write synced.
        Directsync = "directsync",
    }
);

impl DiskCache {
    /// Past the host's page cache?
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }
}

option_enum!(
    /// libvirt's `<driver io=…>`.
    DiskIo, "io", DiskIo, {
        /// Linux AIO.
        Native = "native",
        /// A thread pool.
        Threads = "threads",
        /// io_uring.
        IoUring = "io_uring",
    }
);

option_enum!(
    /// libvirt's `<driver discard=…>`.
    DiskDiscard, "discard", DiskDiscard, {
        /// What the guest discards is given back to the pool.
        Unmap = "unmap",
        /// Discards are ignored.
        Ignore = "ignore",
    }
);

/// libvirt's `<target dev=…>`: `vda` to `vdzzz` or `sda` to `sdzzz`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TargetDevice(String);

impl TargetDevice {
    /// The device name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name at a place in the bus's order: 0 is `vda` or `sda`, 26 is `vdaa`. `None` past `zzz`.
    pub fn at(bus: DiskBus, index: usize) -> Option<Self> {
        let mut letters = Vec::new();
        let mut rest = index + 1;
        while rest > 0 {
            letters.push(b'a' + u8::try_from((rest - 1) % 26).ok()?);
            rest = (rest - 1) / 26;
        }
        letters.reverse();
        let letters = String::from_utf8(letters).ok().filter(|letters| letters.len() <= 3)?;
        Some(Self(format!("{}{letters}", prefix(bus))))
    }

    /// Does the name fit the bus?
    pub fn fits(&self, bus: DiskBus) -> bool {
        self.0.starts_with(prefix(bus))
    }
}

fn prefix(bus: DiskBus) -> &'static str {
    match bus {
        DiskBus::Virtio => "vd",
        DiskBus::Scsi => "sd",
    }
}

impl FromStr for TargetDevice {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let letters = text.strip_prefix("vd").or_else(|| text.strip_prefix("sd")).unwrap_or("");
        if !(1..=3).contains(&letters.len()) || !letters.bytes().all(|b| b.is_ascii_lowercase()) {
            return Err(ParseError::new("target_device", "must be like vdb or sdb", text));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for TargetDevice {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<TargetDevice> for String {
    fn from(device: TargetDevice) -> String {
        device.0
    }
}

impl fmt::Display for TargetDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the guest sees the disk, every default filled in but what follows from what the disk stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOptions {
    /// The bus.
    pub bus: DiskBus,
    /// A wish for the target device; it fits the bus.
    pub target_device: Option<TargetDevice>,
    /// Host caching.
    pub cache: DiskCache,
    /// Host I/O; left out, it follows from what the disk stands on.
    pub io: Option<DiskIo>,
    /// Discards; left out, it follows from how the volume has its space.
    pub discard: Option<DiskDiscard>,
    /// The guest cannot write.
    pub read_only: bool,
    /// The guest's serial, when it is not to be the volume's own.
    pub serial: Option<Serial>,
    /// Only in the running domain.
    pub live_only: bool,
}

impl TryFrom<&wire::DiskOptions> for DiskOptions {
    type Error = ParseError;
    fn try_from(wire: &wire::DiskOptions) -> Result<Self, ParseError> {
        let bus = DiskBus::from_wire(wire.bus)?.unwrap_or(DiskBus::Virtio);
        let cache = DiskCache::from_wire(wire.cache)?.unwrap_or(DiskCache::None);
        let direct = cache.is_direct();
        let io = DiskIo::from_wire(wire.io)?;
        if io == Some(DiskIo::Native) && !direct {
            return Err(ParseError::new("io", "native needs cache none or directsync", cache.as_str()));
        }
        let target_device: Option<TargetDevice> = match wire.target_device.as_str() {
            "" => None,
            text => Some(text.parse()?),
        };
        if let Some(device) = target_device.as_ref().filter(|device| !device.fits(bus)) {
            return Err(ParseError::new(
                "target_device",
                format!("must begin with \"{}\" on bus {bus}", prefix(bus)),
                device.as_str(),
            ));
        }
        Ok(Self {
            bus,
            target_device,
            cache,
            io,
            discard: DiskDiscard::from_wire(wire.discard)?,
            read_only: wire.read_only,
            serial: match wire.serial.as_str() {
                "" => None,
                text => Some(text.parse()?),
            },
            live_only: match wire::Persistence::try_from(wire.persistence) {
                Ok(wire::Persistence::Unspecified | wire::Persistence::Persistent) => false,
                Ok(wire::Persistence::LiveOnly) => true,
                Err(_) => {
                    return Err(ParseError::new(
                        "persistence",
                        "is a number that this agent does not know",
                        &wire.persistence.to_string(),
                    ));
                }
            },
        })
    }
}

impl From<&DiskOptions> for wire::DiskOptions {
    fn from(options: &DiskOptions) -> Self {
        let persistence =
            if options.live_only { wire::Persistence::LiveOnly } else { wire::Persistence::Persistent };
        Self {
            bus: wire::DiskBus::from(options.bus).into(),
            target_device: options.target_device.as_ref().map(ToString::to_string).unwrap_or_default(),
            cache: wire::DiskCache::from(options.cache).into(),
            io: options.io.map(|io| wire::DiskIo::from(io).into()).unwrap_or_default(),
            discard: options
                .discard
                .map(|discard| wire::DiskDiscard::from(discard).into())
                .unwrap_or_default(),
            read_only: options.read_only,
            serial: options.serial.as_ref().map(ToString::to_string).unwrap_or_default(),
            persistence: persistence.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_left_out_gets_the_documented_default() {
        let options = DiskOptions::try_from(&wire::DiskOptions::default()).unwrap();
        assert_eq!(
            (options.bus, options.cache, options.io, options.discard, options.live_only),
            (DiskBus::Virtio, DiskCache::None, None, None, false)
        );
    }

    #[test]
    fn options_that_do_not_go_together_are_refused() {
        let refused = |options: wire::DiskOptions| DiskOptions::try_from(&options).unwrap_err().field;
        let native = wire::DiskOptions {
            cache: wire::DiskCache::Writeback.into(),
            io: wire::DiskIo::Native.into(),
            ..Default::default()
        };
        assert_eq!(refused(native), "io");
        assert_eq!(
            refused(wire::DiskOptions { target_device: "sdb".into(), ..Default::default() }),
            "target_device"
        );
        assert_eq!(
            refused(wire::DiskOptions { target_device: "vd'><x".into(), ..Default::default() }),
            "target_device"
        );
        assert_eq!(refused(wire::DiskOptions { bus: 77, ..Default::default() }), "bus");
        assert_eq!(refused(wire::DiskOptions { serial: "x".repeat(21), ..Default::default() }), "serial");
    }

    #[test]
    fn target_devices_count_like_the_kernel_does() {
        for (index, name) in [(0, "vda"), (25, "vdz"), (26, "vdaa"), (701, "vdzz"), (702, "vdaaa")] {
            assert_eq!(TargetDevice::at(DiskBus::Virtio, index).unwrap().as_str(), name);
        }
        assert_eq!(TargetDevice::at(DiskBus::Scsi, 26 + 26 * 26 + 26 * 26 * 26), None);
    }

    proptest! {
        #[test]
        fn disk_options_go_both_ways(
            bus in 0i32..3, cache in 0i32..5, io in 0i32..4, discard in 0i32..3, read_only: bool,
            serial in "[a-z0-9]{0,20}", persistence in 0i32..3, index in proptest::option::of(0usize..5000)
        ) {
            let mut wire = wire::DiskOptions {
                bus, cache, io, discard, read_only, serial, persistence, target_device: String::new(),
            };
            if let Some(index) = index {
                let bus = if bus == 2 { DiskBus::Scsi } else { DiskBus::Virtio };
                wire.target_device = TargetDevice::at(bus, index).unwrap().to_string();
            }
            if let Ok(options) = DiskOptions::try_from(&wire) {
                prop_assert_eq!(DiskOptions::try_from(&wire::DiskOptions::from(&options)).unwrap(), options);
            }
        }
    }
}
