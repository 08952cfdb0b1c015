//! `Debug` for wire messages that hold a secret; prost's own would print it (rule 11, F44).

use std::fmt;

use crate::wire;

impl fmt::Debug for wire::IscsiConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IscsiConnection")
            .field("target_iqn", &self.target_iqn)
            .field("portals", &self.portals)
            .field("target_portal_group_tag", &self.target_portal_group_tag)
            .field("lun", &self.lun)
            .field("chap_username", &self.chap_username)
            .field("chap_secret", &"not shown")
            .field("wwn", &self.wwn)
            .field("mutual_chap_username", &self.mutual_chap_username)
            .field("mutual_chap_secret", &"not shown")
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f44_a_printed_attach_request_holds_no_secret() {
        let request = wire::AttachRequest {
            connection_info: Some(wire::ConnectionInfo {
                transport: Some(wire::connection_info::Transport::Iscsi(wire::IscsiConnection {
                    chap_secret: "canary-canary".into(),
                    mutual_chap_secret: "canary-in-turn".into(),
                    ..Default::default()
                })),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert!(!format!("{request:?}").contains("canary"));
    }
}
