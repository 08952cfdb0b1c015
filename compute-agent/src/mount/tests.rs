//! Mounts on recorded tables: what is ours, what is not, and how directories are named.

use super::*;
use crate::config::MountOption;

fn mounts(root: &Path, options: &[&str], mountinfo: &str) -> Mounts {
    let options = options.iter().map(|o| MountOption::try_from((*o).to_owned()).unwrap()).collect();
    let mounts = Mounts::open(root, &Nfs { options, ..Nfs::default() }).unwrap();
    let file = root.join("mountinfo");
    fs::write(&file, mountinfo).unwrap();
    Mounts { mountinfo: file, ..mounts }
}

fn share(mounts: &Mounts, server: &str, path: &str) -> Mount {
    mounts.mount_of(server.parse().unwrap(), &path.parse().unwrap())
}

#[test]
fn f46_another_server_path_or_option_is_another_directory() {
    let root = tempfile::tempdir().unwrap();
    let plain = mounts(root.path(), &[], "");
    let other = mounts(root.path(), &["nconnect=4"], "");
    let all = [
        share(&plain, "10.0.0.1", "/srv/a"),
        share(&plain, "10.0.0.2", "/srv/a"),
        share(&plain, "fd00::1", "/srv/a"),
        share(&plain, "10.0.0.1", "/srv/b"),
        share(&other, "10.0.0.1", "/srv/a"),
    ];
    let names: std::collections::HashSet<_> = all.iter().map(|mount| &mount.directory).collect();
    assert_eq!(names.len(), all.len());
    assert_eq!(all[2].share, "[fd00::1]:/srv/a");
    assert_eq!(all[0], share(&plain, "10.0.0.1", "/srv/a"), "the same for ever");
    assert!(all[0].directory.starts_with(root.path().join("mnt")));
}

#[test]
fn f46_a_mount_is_used_only_when_server_path_and_options_are_the_same() {
    let root = tempfile::tempdir().unwrap();
    let mount = share(&mounts(root.path(), &[], ""), "10.0.0.1", "/srv/a");
    let on = |rest: &str| {
        let line = format!("40 25 0:38 / {} rw,relatime shared:1 - {rest}\n", mount.directory.display());
        mounts(root.path(), &[], &line).state(&mount).unwrap()
    };
    assert_eq!(
        on("nfs4 10.0.0.1:/srv/a rw,vers=4.2,hard,nosharecache,proto=tcp,timeo=600"),
        State::Mounted { device: "0:38".to_owned() }
    );
    for other in [
        "nfs4 10.0.0.1:/srv/a rw,vers=4.2,soft,nosharecache",
        "nfs4 10.0.0.1:/srv/a ro,vers=4.2,hard,nosharecache",
        "nfs4 10.0.0.1:/srv/a rw,vers=4.0,hard,nosharecache",
        "nfs 10.0.0.1:/srv/a rw,vers=3,hard",
        "nfs4 10.0.0.1:/srv/a rw,vers=4.2,hard",
        "nfs4 10.0.0.2:/srv/a rw,vers=4.2,hard,nosharecache",
        "nfs4 10.0.0.1:/srv/b rw,vers=4.2,hard,nosharecache",
        "tmpfs none rw",
    ] {
        assert!(matches!(on(other), State::Other(_)), "{other}");
    }
    assert_eq!(mounts(root.path(), &[], "").state(&mount).unwrap(), State::Absent);

    let options = ["timeo=100", "rsize=65536"];
    let mount = share(&mounts(root.path(), &options, ""), "10.0.0.1", "/srv/a");
    let on = |rest: &str| {
        let line = format!("40 25 0:38 / {} rw - nfs4 10.0.0.1:/srv/a {rest}\n", mount.directory.display());
        mounts(root.path(), &options, &line).state(&mount).unwrap()
    };
    let good = "rw,vers=4.2,hard,nosharecache,rsize=32768,timeo=100";
    assert!(matches!(on(good), State::Mounted { .. }), "the server may have asked for smaller reads");
    assert!(matches!(on(&good.replace("timeo=100", "timeo=600")), State::Other(_)));
}

/// F25: a process that the kernel does not let end keeps its share busy, and no other; once it has ended, all is well.
#[test]
fn f25_a_stuck_process_keeps_only_its_share_busy() {
    let root = tempfile::tempdir().unwrap();
    let mounts = mounts(root.path(), &[], "");
    let (one, two) = (share(&mounts, "10.0.0.1", "/srv/a"), share(&mounts, "10.0.0.2", "/srv/a"));
    mounts.helpers.note_stuck(&one, std::process::id());
    let error = mounts.helpers.check_not_stuck(&one).unwrap_err();
    assert!(matches!(error, MountError::Stuck { pid, .. } if pid == std::process::id()));
    mounts.helpers.check_not_stuck(&two).unwrap();
    // The pid is somebody else's by now.
    mounts.helpers.stuck.lock().unwrap().insert(one.directory.clone(), (std::process::id(), "1".to_owned()));
    mounts.helpers.check_not_stuck(&one).unwrap();
}
