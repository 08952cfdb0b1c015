//! Who connects to what: connectors and connection info, wire to domain type and back.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, Iqn, NfsConnection, ParseError, Portal, Secret, Serial, VolumeFormat, Wwn, wire};

/// May the connector write?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessMode {
    /// One writer.
    ReadWrite,
    /// The storage host refuses writes.
    ReadOnly,
}

impl From<wire::AccessMode> for AccessMode {
    fn from(mode: wire::AccessMode) -> Self {
        match mode {
            wire::AccessMode::ReadOnly => Self::ReadOnly,
            wire::AccessMode::Unspecified | wire::AccessMode::ReadWrite => Self::ReadWrite,
        }
    }
}

impl From<AccessMode> for wire::AccessMode {
    fn from(mode: AccessMode) -> Self {
        match mode {
            AccessMode::ReadWrite => Self::ReadWrite,
            AccessMode::ReadOnly => Self::ReadOnly,
        }
    }
}

impl TryFrom<i32> for AccessMode {
    type Error = ParseError;
    fn try_from(number: i32) -> Result<Self, ParseError> {
        wire::AccessMode::try_from(number).map(Self::from).map_err(|_| {
            ParseError::new(
                "access_mode",
                "must be ACCESS_MODE_READ_WRITE or _READ_ONLY",
                &number.to_string(),
            )
        })
    }
}

/// What a compute host tells about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connector {
    /// The host's name, for people: 1 to 253 of `a-z A-Z 0-9 . _ -`.
    pub hostname: String,
    /// The initiator's name; the only one that gets in.
    pub initiator_iqn: Iqn,
    /// The host's own addresses.
    pub addresses: Vec<IpAddr>,
    /// Versions by name.
    pub versions: BTreeMap<String, String>,
}

impl TryFrom<&wire::Connector> for Connector {
    type Error = ParseError;
    fn try_from(wire: &wire::Connector) -> Result<Self, ParseError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !(1..=253).contains(&wire.hostname.len()) || !wire.hostname.bytes().all(legal) {
            return Err(ParseError::new(
                "connector.hostname",
                "must have 1 to 253 of a-z A-Z 0-9 . _ -",
                &wire.hostname,
            ));
        }
        Ok(Self {
            hostname: wire.hostname.clone(),
            initiator_iqn: wire
                .initiator_iqn
                .parse()
                .map_err(|error: ParseError| ParseError { field: "connector.initiator_iqn", ..error })?,
            addresses: wire
                .addresses
                .iter()
                .map(|text| {
                    text.parse().map_err(|_| {
                        ParseError::new("connector.addresses", "must be an IPv4 or IPv6 address", text)
                    })
                })
                .collect::<Result<_, _>>()?,
            versions: wire.versions.clone().into_iter().collect(),
        })
    }
}

impl From<&Connector> for wire::Connector {
    fn from(connector: &Connector) -> Self {
        Self {
            hostname: connector.hostname.clone(),
            initiator_iqn: connector.initiator_iqn.to_string(),
            addresses: connector.addresses.iter().map(ToString::to_string).collect(),
            versions: connector.versions.clone().into_iter().collect(),
        }
    }
}

/// An iSCSI target with the volume as LUN 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IscsiConnection {
    /// The target's name.
    pub target_iqn: Iqn,
    /// Where it listens; at least one.
    pub portals: Vec<Portal>,
    /// The portal group's tag.
    pub target_portal_group_tag: u16,
    /// The CHAP user name: 1 to 128 of `a-z A-Z 0-9 . _ : -`.
    pub chap_username: String,
    /// The CHAP secret.
    #[serde(with = "crate::exposed")]
    pub chap_secret: Secret,
    /// What the device must answer to.
    pub wwn: Wwn,
    /// What the target proves itself by in turn; nothing when it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mutual_chap: Option<MutualChap>,
}

/// What a target proves itself by to an initiator (RFC 7143 section 12.1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MutualChap {
    /// The name that the target gives: 1 to 128 of `a-z A-Z 0-9 . _ : -`.
    pub username: String,
    /// The secret, another one than the initiator's.
    #[serde(with = "crate::exposed")]
    pub secret: Secret,
}

/// How a volume is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// A target with the volume as LUN 0.
    Iscsi(IscsiConnection),
    /// A file in a shared directory.
    Nfs(NfsConnection),
}

impl Transport {
    /// What is in the volume. An LV is the guest's bytes and nothing else.
    pub fn format(&self) -> VolumeFormat {
        match self {
            Self::Iscsi(_) => VolumeFormat::Raw,
            Self::Nfs(nfs) => nfs.format,
        }
    }

    /// Is it a file whose space is to stay taken? An LV keeps its extents whatever is discarded.
    pub fn keeps_allocated(&self) -> bool {
        matches!(self, Self::Nfs(nfs) if nfs.keep_allocated)
    }
}

impl From<&Transport> for wire::Transport {
    fn from(transport: &Transport) -> Self {
        match transport {
            Transport::Iscsi(_) => Self::Iscsi,
            Transport::Nfs(_) => Self::Nfs,
        }
    }
}

/// All that a connector needs to reach an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// How the volume is reached.
    #[serde(flatten)]
    pub transport: Transport,
    /// The volume's size.
    pub size: ByteSize,
    /// May the connector write?
    pub access_mode: AccessMode,
    /// The volume's own serial.
    pub serial: Serial,
    /// Several hosts may have the volume at a time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub multi_attach: bool,
}

impl TryFrom<&wire::ConnectionInfo> for ConnectionInfo {
    type Error = ParseError;
    fn try_from(info: &wire::ConnectionInfo) -> Result<Self, ParseError> {
        use wire::connection_info::Transport as Wire;
        let transport = match &info.transport {
            Some(Wire::Iscsi(iscsi)) => Transport::Iscsi(iscsi.try_into()?),
            Some(Wire::Nfs(nfs)) => Transport::Nfs(nfs.try_into()?),
            None => return Err(ParseError::missing("connection_info.transport")),
        };
        Ok(Self {
            transport,
            size: info.size_bytes.try_into()?,
            access_mode: info.access_mode.try_into()?,
            serial: info.serial.parse()?,
            multi_attach: info.multi_attach,
        })
    }
}

impl From<&ConnectionInfo> for wire::ConnectionInfo {
    fn from(info: &ConnectionInfo) -> Self {
        use wire::connection_info::Transport as Wire;
        Self {
            transport: Some(match &info.transport {
                Transport::Iscsi(iscsi) => Wire::Iscsi(iscsi.into()),
                Transport::Nfs(nfs) => Wire::Nfs(nfs.into()),
            }),
            size_bytes: info.size.bytes(),
            access_mode: wire::AccessMode::from(info.access_mode).into(),
            serial: info.serial.to_string(),
            multi_attach: info.multi_attach,
        }
    }
}

impl TryFrom<&wire::IscsiConnection> for IscsiConnection {
    type Error = ParseError;
    fn try_from(wire: &wire::IscsiConnection) -> Result<Self, ParseError> {
        if wire.portals.is_empty() {
            return Err(ParseError::missing("portals"));
        }
        if wire.lun != 0 {
            return Err(ParseError::new(
                "lun",
                "must be 0: an export has a target of its own",
                &wire.lun.to_string(),
            ));
        }
        let tag =
            u16::try_from(wire.target_portal_group_tag).ok().filter(|tag| *tag > 0).ok_or_else(|| {
                ParseError::new(
                    "target_portal_group_tag",
                    "must be from 1 to 65535",
                    &wire.target_portal_group_tag.to_string(),
                )
            })?;
        let chap_secret = Secret::new(wire.chap_secret.clone())?;
        let mutual_chap = match (wire.mutual_chap_username.as_str(), wire.mutual_chap_secret.as_str()) {
            ("", "") => None,
            (username, secret) => Some(MutualChap {
                username: chap_username("mutual_chap_username", username)?,
                secret: Secret::new(secret)
                    .map_err(|error| ParseError { field: "mutual_chap_secret", ..error })?,
            }),
        };
        // Whoever asks for the one could answer with the other's (RFC 7143 section 9.2.1).
        if mutual_chap.as_ref().is_some_and(|mutual| mutual.secret == chap_secret) {
            return Err(ParseError {
                field: "mutual_chap_secret",
                problem: "must be another secret than chap_secret".into(),
                value: "the same (not shown)".into(),
            });
        }
        Ok(Self {
            target_iqn: wire
                .target_iqn
                .parse()
                .map_err(|error: ParseError| ParseError { field: "target_iqn", ..error })?,
            portals: wire.portals.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
            target_portal_group_tag: tag,
            chap_username: chap_username("chap_username", &wire.chap_username)?,
            chap_secret,
            wwn: wire.wwn.parse()?,
            mutual_chap,
        })
    }
}

fn chap_username(field: &'static str, text: &str) -> Result<String, ParseError> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
    if (1..=128).contains(&text.len()) && text.bytes().all(legal) {
        return Ok(text.to_owned());
    }
    Err(ParseError::new(field, "must have 1 to 128 of a-z A-Z 0-9 . _ : -", text))
}

impl From<&IscsiConnection> for wire::IscsiConnection {
    fn from(iscsi: &IscsiConnection) -> Self {
        let mutual = iscsi.mutual_chap.as_ref();
        Self {
            target_iqn: iscsi.target_iqn.to_string(),
            portals: iscsi.portals.iter().map(ToString::to_string).collect(),
            target_portal_group_tag: iscsi.target_portal_group_tag.into(),
            lun: 0,
            chap_username: iscsi.chap_username.clone(),
            chap_secret: iscsi.chap_secret.expose().to_owned(),
            wwn: iscsi.wwn.to_string(),
            mutual_chap_username: mutual.map(|mutual| mutual.username.clone()).unwrap_or_default(),
            mutual_chap_secret: mutual.map(|mutual| mutual.secret.expose().to_owned()).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_connection_info() -> impl Strategy<Value = ConnectionInfo> {
        (
            "[a-z0-9][a-z0-9-]{0,30}",
            proptest::collection::vec((any::<u32>(), 1u16..), 1..4),
            1u16..,
            "[a-z0-9._:-]{1,40}",
            "[a-zA-Z0-9]{12,40}",
            (
                "6[0-9a-f]{31}",
                1u64..,
                any::<bool>(),
                "[a-zA-Z0-9_.+-]{1,20}",
                proptest::option::of("[a-zA-Z0-9]{41}"),
            ),
        )
            .prop_filter_map(
                "portals must be addresses of one host",
                |(target, portals, tag, user, secret, rest)| {
                    let (wwn, size, read_only, serial, mutual) = rest;
                    let portals = portals
                        .into_iter()
                        .map(|(address, port)| {
                            format!("{}:{port}", std::net::Ipv4Addr::from(address)).parse().ok()
                        })
                        .collect::<Option<Vec<Portal>>>()?;
                    Some(ConnectionInfo {
                        transport: Transport::Iscsi(IscsiConnection {
                            target_iqn: format!("iqn.2026-11.io.example:{target}").parse().ok()?,
                            portals,
                            target_portal_group_tag: tag,
                            chap_username: user,
                            chap_secret: Secret::new(secret).ok()?,
                            wwn: wwn.parse().ok()?,
                            mutual_chap: mutual
                                .and_then(|secret| Secret::new(secret).ok())
                                .map(|secret| MutualChap { username: "target".into(), secret }),
                        }),
                        size: size.try_into().ok()?,
                        access_mode: if read_only { AccessMode::ReadOnly } else { AccessMode::ReadWrite },
                        serial: serial.parse().ok()?,
                        multi_attach: !read_only,
                    })
                },
            )
    }

    proptest! {
        #[test]
        fn connection_info_goes_both_ways(info in any_connection_info()) {
            prop_assert_eq!(ConnectionInfo::try_from(&wire::ConnectionInfo::from(&info)).unwrap(), info);
        }

        #[test]
        fn connection_info_over_nfs_goes_both_ways_and_into_a_journal(
            nfs in crate::nfs::tests::any_nfs_connection(), size in 1u64.., read_only: bool
        ) {
            let info = ConnectionInfo {
                transport: Transport::Nfs(nfs),
                size: size.try_into().unwrap(),
                access_mode: if read_only { AccessMode::ReadOnly } else { AccessMode::ReadWrite },
                serial: "s".parse().unwrap(),
                multi_attach: !read_only,
            };
            prop_assert_eq!(&ConnectionInfo::try_from(&wire::ConnectionInfo::from(&info)).unwrap(), &info);
            let text = serde_json::to_string(&info).unwrap();
            prop_assert_eq!(serde_json::from_str::<ConnectionInfo>(&text).unwrap(), info);
        }

        #[test]
        fn connectors_go_both_ways(hostname in "[a-zA-Z0-9._-]{1,60}", name in "[a-z0-9]{1,20}", addresses: Vec<IpAddr>) {
            let connector = Connector {
                hostname,
                initiator_iqn: format!("iqn.1993-08.org.debian:01:{name}").parse().unwrap(),
                addresses,
                versions: BTreeMap::from([("kernel".into(), "6.1".into())]),
            };
            prop_assert_eq!(Connector::try_from(&wire::Connector::from(&connector)).unwrap(), connector);
        }

        #[test]
        fn no_wire_message_makes_the_parser_panic(
            iqn in ".{0,40}", portals in proptest::collection::vec(".{0,30}", 0..3), tag: u32, lun: u32, text in ".{0,40}"
        ) {
            let _unused = IscsiConnection::try_from(&wire::IscsiConnection {
                target_iqn: iqn, portals, target_portal_group_tag: tag, lun,
                chap_username: text.clone(), chap_secret: text.clone(), wwn: text.clone(),
                mutual_chap_username: text.clone(), mutual_chap_secret: text,
            });
        }
    }

    /// Journals of agents that knew iSCSI alone are still read.
    #[test]
    fn a_journal_names_the_transport() {
        let text = r#"{"iscsi":{"target_iqn":"iqn.2026-11.io.example:x","portals":["10.0.0.1:3260"],
            "target_portal_group_tag":1,"chap_username":"u","chap_secret":"secret-secret",
            "wwn":"60014050000000000000000000000001"},"size":4096,"access_mode":"read-write","serial":"s"}"#;
        let info: ConnectionInfo = serde_json::from_str(text).unwrap();
        assert!(matches!(&info.transport, Transport::Iscsi(iscsi) if iscsi.target_portal_group_tag == 1));
        let wanted: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&info).unwrap(), wanted);
    }

    #[test]
    fn f43_a_target_proves_itself_by_a_name_and_a_secret_of_its_own_or_not_at_all() {
        let plain = wire::IscsiConnection {
            target_iqn: "iqn.2026-11.io.example:x".into(),
            portals: vec!["10.0.0.1:3260".into()],
            target_portal_group_tag: 1,
            chap_username: "u".into(),
            chap_secret: "secret-secret".into(),
            wwn: "60014050000000000000000000000001".into(),
            ..Default::default()
        };
        assert_eq!(IscsiConnection::try_from(&plain).unwrap().mutual_chap, None);
        for (username, secret, wrong) in [
            ("t", "another-secret", None),
            ("t", "secret-secret", Some("mutual_chap_secret")),
            ("t", "", Some("mutual_chap_secret")),
            ("t", "short", Some("mutual_chap_secret")),
            ("", "another-secret", Some("mutual_chap_username")),
            ("t t", "another-secret", Some("mutual_chap_username")),
        ] {
            let mutual = wire::IscsiConnection {
                mutual_chap_username: username.into(),
                mutual_chap_secret: secret.into(),
                ..plain.clone()
            };
            let parsed = IscsiConnection::try_from(&mutual);
            assert_eq!(parsed.as_ref().err().map(|error| error.field), wrong, "{username} {secret}");
            assert_eq!(parsed.is_ok_and(|iscsi| iscsi.mutual_chap.is_some()), wrong.is_none());
        }
    }

    #[test]
    fn a_connection_without_portal_transport_or_lun_0_is_refused() {
        assert!(ConnectionInfo::try_from(&wire::ConnectionInfo::default()).is_err());
        let iscsi =
            wire::IscsiConnection { target_iqn: "iqn.2026-11.io.example:x".into(), ..Default::default() };
        assert_eq!(IscsiConnection::try_from(&iscsi).unwrap_err().field, "portals");
        let iscsi = wire::IscsiConnection { portals: vec!["10.0.0.1:3260".into()], lun: 1, ..iscsi };
        assert_eq!(IscsiConnection::try_from(&iscsi).unwrap_err().field, "lun");
    }
}
