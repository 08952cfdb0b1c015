//! Roles, and the one that each RPC needs: the only table of it. Every RPC that an agent serves is in it; what is not in it is
//! served to nobody. The `.proto` files say the same to those who call. Not here: who has which role (the agents' config).
//!
//! A reader looks. An operator also brings hosts back to what was asked of them. A controller also asks for something new:
//! to extend a volume is such a thing, since nothing makes it smaller again and the controller's books would be wrong.

use std::fmt;

/// What a caller may do. Each role may do all that the ones before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Looks, and changes nothing.
    Reader,
    /// Looks, and lets agents put right what is not as it was asked for.
    Operator,
    /// Everything.
    Controller,
}

impl Role {
    /// All of them, the one that may do least first.
    pub const ALL: [Self; 3] = [Self::Reader, Self::Operator, Self::Controller];

    /// As in configs, logs and errors.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Operator => "operator",
            Self::Controller => "controller",
        }
    }

    /// The organizational unit in the subject of certificates that `tether pki` issues for the role.
    pub fn organizational_unit(self) -> &'static str {
        match self {
            Self::Reader => "tether-reader",
            Self::Operator => "tether-operator",
            Self::Controller => "tether-controller",
        }
    }

    /// The role that a call needs. `path` is that of the HTTP request, `/SERVICE/RPC`. Nothing for what is no RPC of the agents.
    pub fn needed(path: &str) -> Option<Self> {
        NEEDED.iter().find(|(rpc, _)| *rpc == path).map(|(_, role)| *role)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The role that each RPC needs.
pub const NEEDED: [(&str, Role); 30] = [
    ("/tether.v1.StorageAgent/CreateVolume", Role::Controller),
    ("/tether.v1.StorageAgent/DeleteVolume", Role::Controller),
    ("/tether.v1.StorageAgent/ExtendVolume", Role::Controller),
    ("/tether.v1.StorageAgent/GetVolume", Role::Reader),
    ("/tether.v1.StorageAgent/ListVolumes", Role::Reader),
    ("/tether.v1.StorageAgent/ListPools", Role::Reader),
    // Its answer holds the secret, also when the export is there already.
    ("/tether.v1.StorageAgent/Export", Role::Controller),
    ("/tether.v1.StorageAgent/Unexport", Role::Controller),
    ("/tether.v1.StorageAgent/GetExport", Role::Reader),
    ("/tether.v1.StorageAgent/ListExports", Role::Reader),
    // Also for a dry run: whether it is one stands in the request, which is not read before the role is known.
    ("/tether.v1.StorageAgent/Reconcile", Role::Operator),
    ("/tether.v1.StorageAgent/ListObjects", Role::Reader),
    // Changes nothing, but starts programs on the host.
    ("/tether.v1.StorageAgent/Diagnose", Role::Operator),
    ("/tether.v1.StorageAgent/WatchOperation", Role::Reader),
    ("/tether.v1.StorageAgent/Watch", Role::Reader),
    ("/tether.v1.ComputeAgent/GetConnector", Role::Reader),
    ("/tether.v1.ComputeAgent/Attach", Role::Controller),
    ("/tether.v1.ComputeAgent/Detach", Role::Controller),
    ("/tether.v1.ComputeAgent/ResizeAttachment", Role::Controller),
    ("/tether.v1.ComputeAgent/GetAttachment", Role::Reader),
    ("/tether.v1.ComputeAgent/ListAttachments", Role::Reader),
    ("/tether.v1.ComputeAgent/Reconcile", Role::Operator),
    ("/tether.v1.ComputeAgent/ListObjects", Role::Reader),
    // Changes nothing, but starts programs on the host.
    ("/tether.v1.ComputeAgent/Diagnose", Role::Operator),
    ("/tether.v1.ComputeAgent/WatchOperation", Role::Reader),
    ("/tether.v1.ComputeAgent/Watch", Role::Reader),
    ("/grpc.health.v1.Health/Check", Role::Reader),
    ("/grpc.health.v1.Health/Watch", Role::Reader),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Role::Reader),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Role::Reader),
];

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use prost_types::FileDescriptorSet;
    use std::collections::BTreeMap;

    /// Every RPC of a descriptor set, and its comment.
    fn rpcs(descriptors: &[u8]) -> BTreeMap<String, String> {
        let mut rpcs = BTreeMap::new();
        for file in FileDescriptorSet::decode(descriptors).unwrap().file {
            let comments = file.source_code_info.clone().unwrap_or_default().location;
            for (service_number, service) in (0..).zip(&file.service) {
                for (number, method) in (0..).zip(&service.method) {
                    // descriptor.proto: FileDescriptorProto.service = 6, ServiceDescriptorProto.method = 2.
                    let place = [6, service_number, 2, number];
                    let comment = comments.iter().find(|location| location.path == place);
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    rpcs.insert(path, comment.map_or_else(String::new, |c| c.leading_comments().to_owned()));
                }
            }
        }
        rpcs
    }

    #[test]
    fn every_rpc_needs_a_role_and_its_comment_says_which() {
        let rpcs = rpcs(crate::FILE_DESCRIPTOR_SET);
        for (path, comment) in &rpcs {
            let role = Role::needed(path).unwrap_or_else(|| panic!("{path} is not in the table"));
            let words = format!("Needs the role {role}");
            assert!(comment.contains(&words), "the comment of {path} does not say: {words}");
        }
        for (path, _) in NEEDED.iter().filter(|(path, _)| path.starts_with("/tether.")) {
            assert!(rpcs.contains_key(*path), "there is no {path}");
        }
    }

    #[test]
    fn a_reader_changes_nothing_and_an_operator_asks_for_nothing_new() {
        for (path, role) in NEEDED {
            let verb = path.rsplit('/').next().unwrap();
            let looks = ["Get", "List", "Watch", "Check", "ServerReflectionInfo"];
            let expected = match verb {
                "Reconcile" | "Diagnose" => Role::Operator,
                _ if looks.iter().any(|look| verb.starts_with(look)) => Role::Reader,
                _ => Role::Controller,
            };
            assert_eq!(role, expected, "{path}");
        }
        assert_eq!(Role::needed("/tether.v1.StorageAgent/Nope"), None);
        assert!(Role::Reader < Role::Operator && Role::Operator < Role::Controller);
    }
}
