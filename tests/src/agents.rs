//! What a test or the quickstart installs on the two hosts: packages, then files, then commands.
//!
//! Not here: which ones those are, their caller knows; when the result is saved (see `lab`).

use std::time::Duration;

use crate::cache;
use crate::host::{COMMAND_DEADLINE, Host};

/// Where the packages are kept on a host.
pub const PACKAGES: &str = "/var/cache/tether-lab";
/// How long dpkg may take for all of them.
const DPKG_DEADLINE: Duration = Duration::from_secs(300);

/// What is installed on one host, in this order.
#[derive(Debug, Clone, Default)]
pub struct HostSetup {
    /// Debian packages: file name, content. All that they need is there: the hosts have no way out.
    pub packages: Vec<(String, Vec<u8>)>,
    /// Path on the host, permissions, content.
    pub files: Vec<(String, u32, Vec<u8>)>,
    /// Shell commands, run one after the other once all files are there.
    pub commands: Vec<String>,
}

/// What is installed on both hosts.
#[derive(Debug, Clone, Default)]
pub struct Agents {
    /// On `storage`.
    pub storage: HostSetup,
    /// On `compute`.
    pub compute: HostSetup,
}

impl Agents {
    /// Names all of the content: equal agents have equal keys.
    pub fn key(&self) -> String {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        for setup in [&self.storage, &self.compute] {
            parts.push(b"host".to_vec());
            for (name, content) in &setup.packages {
                parts.extend([name.clone().into_bytes(), content.clone()]);
            }
            parts.push(b"files".to_vec());
            for (path, mode, content) in &setup.files {
                parts.extend([path.clone().into_bytes(), mode.to_le_bytes().to_vec(), content.clone()]);
            }
            parts.push(b"commands".to_vec());
            parts.extend(setup.commands.iter().map(|c| c.clone().into_bytes()));
        }
        cache::key(parts.iter().map(Vec::as_slice))
    }
}

impl HostSetup {
    /// Installs the packages, places the files, then runs the commands.
    pub(crate) async fn apply(&self, host: &Host) -> anyhow::Result<()> {
        for (name, content) in &self.packages {
            host.put(content.clone(), &format!("{PACKAGES}/{name}"), 0o644).await?;
        }
        if !self.packages.is_empty() {
            let names: Vec<&str> = self.packages.iter().map(|(name, _)| name.as_str()).collect();
            let install = format!("cd {PACKAGES} && dpkg -i {}", names.join(" "));
            host.run_within(&install, DPKG_DEADLINE).await?;
        }
        for (path, mode, content) in &self.files {
            host.put(content.clone(), path, *mode).await?;
        }
        for command in &self.commands {
            host.run_within(command, COMMAND_DEADLINE).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_that_differ_have_other_keys() {
        let file = |content: &str| Agents {
            storage: HostSetup { files: vec![("/a".into(), 0o755, content.into())], ..HostSetup::default() },
            compute: HostSetup::default(),
        };
        assert_eq!(file("x").key(), file("x").key());
        assert_ne!(file("x").key(), file("y").key());
        assert_ne!(file("x").key(), Agents { compute: file("x").storage, ..Agents::default() }.key());
    }
}
