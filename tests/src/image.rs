//! The hosts' disk image, from Debian packages, cached by the content of everything that makes it.
//!
//! The work is done by two scripts in `image/`: `root-tree` (packages, slow) and `disk-image` (everything that is ours,
//! seconds), each with a cache entry of its own. Here: which suite and mirror, and the keys. Not here: starting hosts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use tether_agent_core::command::CommandLine;

use crate::cache;
use crate::progress::step;

/// What the image scripts read: path, permissions, content. All of it decides the image's key.
const FILES: &[(&str, u32, &str)] = &[
    ("packages.txt", 0o644, include_str!("../image/packages.txt")),
    ("root-tree", 0o755, include_str!("../image/root-tree")),
    ("disk-image", 0o755, include_str!("../image/disk-image")),
    ("host/init", 0o755, include_str!("../image/host/init")),
    ("host/lan.network", 0o644, include_str!("../image/host/lan.network")),
    ("host/management.network", 0o644, include_str!("../image/host/management.network")),
    ("host/sshd.conf", 0o644, include_str!("../image/host/sshd.conf")),
    ("host/provision-storage", 0o755, include_str!("../image/host/provision-storage")),
    ("host/provision-compute", 0o755, include_str!("../image/host/provision-compute")),
    ("guest/init", 0o755, include_str!("../image/guest/init")),
    ("guest/commands", 0o755, include_str!("../image/guest/commands")),
    ("guest/disk-event", 0o755, include_str!("../image/guest/disk-event")),
    ("guest/disk-facts", 0o755, include_str!("../image/guest/disk-facts")),
    ("guest/domain.xml", 0o644, include_str!("../image/guest/domain.xml")),
];
/// Those that decide the root tree alone.
const ROOT_TREE: &[&str] = &["packages.txt", "root-tree"];
/// Downloading and unpacking packages, on a slow line.
const ROOT_TREE_DEADLINE: Duration = Duration::from_secs(1800);
/// Making the image out of the tree.
const DISK_IMAGE_DEADLINE: Duration = Duration::from_secs(300);

/// A complete image: `root.img`, `vmlinuz`, `initrd`, `host-key.pub`.
#[derive(Debug, Clone)]
pub struct Image {
    /// The folder with its files; nobody changes them.
    pub folder: PathBuf,
    /// Names its content.
    pub key: String,
}

/// The key that the hosts accept for root, made once per cache folder. Gives the private key's path.
///
/// # Errors
/// When it cannot be made or read.
pub async fn ssh_key() -> anyhow::Result<PathBuf> {
    let folder = cache::entry("ssh-key", "ed25519", |folder| async move {
        CommandLine::new("/usr/bin/ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "tether-lab", "-f"])
            .arg(folder.join("key"))
            .run()
            .await?;
        Ok(())
    });
    Ok(folder.await?.join("key"))
}

/// The image, made when the cache does not have it.
///
/// # Errors
/// When a package cannot be had, or a tool is missing: run `packaging/setup`.
pub async fn image() -> anyhow::Result<Image> {
    let suite = suite()?;
    let key = ssh_key().await?;
    let public_key = read(&key.with_extension("pub"))?;

    let contents = |wanted: &dyn Fn(&str) -> bool| {
        let mut parts = vec![suite.as_bytes().to_vec()];
        for (name, _, content) in FILES.iter().filter(|(name, ..)| wanted(name)) {
            parts.push(name.as_bytes().to_vec());
            parts.push(content.as_bytes().to_vec());
        }
        parts
    };
    let tree_parts = contents(&|name| ROOT_TREE.contains(&name));
    let tree_key = cache::key(tree_parts.iter().map(Vec::as_slice));
    let mut image_parts = contents(&|_| true);
    image_parts.push(public_key.into_bytes());
    let image_key = cache::key(image_parts.iter().map(Vec::as_slice));

    let folder = cache::entry("image", &image_key, |out| async move {
        let scripts = tempfile::tempdir().context("no temporary folder")?;
        for (name, mode, content) in FILES {
            write_file(&scripts.path().join(name), *mode, content)?;
        }
        let tree = root_tree(&tree_key, scripts.path(), &suite).await?;
        let make = as_root(&scripts.path().join("disk-image"))
            .arg(tree.join("root.tar"))
            .arg(scripts.path())
            .arg(key.with_extension("pub"))
            .arg(&out)
            .deadline(DISK_IMAGE_DEADLINE);
        step("making the hosts' disk image", async {
            make.run().await?;
            give_to_me(&out).await
        })
        .await
    })
    .await?;
    Ok(Image { folder, key: image_key })
}

async fn root_tree(key: &str, scripts: &Path, suite: &str) -> anyhow::Result<PathBuf> {
    let debs = cache::folder()?.join("debs");
    cache::entry("root-tree", key, |out| async move {
        let mirror = mirror_of_machine().await?;
        let make = as_root(&scripts.join("root-tree"))
            .arg(scripts.join("packages.txt"))
            .args([suite, &mirror])
            .arg(&debs)
            .arg(out.join("root.tar"))
            .deadline(ROOT_TREE_DEADLINE);
        step(&format!("installing Debian {suite} packages for the hosts from {mirror}"), async {
            make.run().await?;
            give_to_me(&out).await
        })
        .await
    })
    .await
}

/// Unpacking packages needs root; without it sudo is asked for, for these two scripts only.
fn as_root(program: &Path) -> CommandLine {
    if nix::unistd::geteuid().is_root() {
        CommandLine::new(program)
    } else {
        CommandLine::new("/usr/bin/sudo").arg(program)
    }
}

async fn give_to_me(path: &Path) -> anyhow::Result<()> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if !user.is_root() {
        let owner = format!("{user}:{group}");
        CommandLine::new("/usr/bin/sudo").args(["chown", "-R", &owner]).arg(path).run().await?;
    }
    Ok(())
}

/// The hosts run what was built on this machine, so they are of its own release.
fn suite() -> anyhow::Result<String> {
    if let Some(suite) = std::env::var("TETHER_LAB_SUITE").ok().filter(|s| !s.is_empty()) {
        return Ok(suite);
    }
    let release = read(Path::new("/etc/os-release"))?;
    suite_of(&release)
}

fn suite_of(os_release: &str) -> anyhow::Result<String> {
    let value = |name: &str| {
        let line = os_release.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim().trim_matches(['"', '\'']).to_string())
    };
    match (value("ID").as_deref(), value("VERSION_CODENAME")) {
        (Some("debian"), Some(suite)) if !suite.is_empty() => Ok(suite),
        (id, _) => bail!(
            "this machine is '{}', not a released Debian: set TETHER_LAB_SUITE to the Debian suite whose C library \
             is not older than this machine's",
            id.unwrap_or("unknown")
        ),
    }
}

/// The Debian mirror that this machine uses.
async fn mirror_of_machine() -> anyhow::Result<String> {
    let told = CommandLine::new("/usr/bin/apt-get")
        .args(["indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages"])
        .run()
        .await?
        .stdout;
    mirror_of(&told)
        .context("apt knows no Debian mirror: add one to /etc/apt/sources.list, then apt-get update")
}

fn mirror_of(index_targets: &str) -> Option<String> {
    let plain = |uri: &&str| uri.starts_with("http://") || uri.starts_with("https://");
    let mut mirrors = index_targets.lines().filter_map(|l| l.strip_prefix("Debian Debian ")).filter(plain);
    Some(mirrors.next()?.trim_end_matches('/').to_string())
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write_file(path: &Path, mode: u32, content: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(parent) = path.parent() {
        cache::make_folder(parent)?;
    }
    std::fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suite_is_the_machines_own() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_CODENAME=bookworm\n";
        assert_eq!(suite_of(debian).unwrap(), "bookworm");
        assert!(suite_of("ID=fedora\n").unwrap_err().to_string().contains("TETHER_LAB_SUITE"));
    }

    #[test]
    fn mirror_is_the_machines_own_when_it_is_debians() {
        let told = "Debian Debian-Security http://x/debian-security/\nDebian Debian http://mirror/debian/\n";
        assert_eq!(mirror_of(told).as_deref(), Some("http://mirror/debian"));
        assert_eq!(mirror_of("Other Other https://example.org/"), None);
    }
}
