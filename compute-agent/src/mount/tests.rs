//! Mounts on recorded tables: what is ours, what is not, and how directories are named.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tether_agent_core::failure::{Failure, Reason};

use super::*;
use crate::config::MountOption;

fn mounts(root: &Path, options: &[&str], mountinfo: &str) -> Mounts {
    let options = options.iter().map(|o| MountOption::try_from((*o).to_owned()).unwrap()).collect();
    let mounts = Mounts::open(root, &Nfs { options, ..Nfs::default() }, Stuck::default()).unwrap();
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
        let own = "rw,nosuid,nodev,noexec,relatime";
        let line = format!("40 25 0:38 / {} {own} shared:1 - {rest}\n", mount.directory.display());
        mounts(root.path(), &[], &line).state(&mount).unwrap()
    };
    // As kernel 6.1 shows a mount of ours.
    let good = "nfs4 10.0.0.1:/srv/a rw,vers=4.2,rsize=131072,wsize=131072,namlen=255,hard,nosharecache,proto=tcp,timeo=600,\
                retrans=2,sec=sys,clientaddr=10.0.0.9,local_lock=none,addr=10.0.0.1";
    assert_eq!(on(good), State::Mounted { device: "0:38".to_owned() });
    assert!(matches!(on(&good.replace("rsize=131072", "rsize=32768,nconnect=4")), State::Mounted { .. }));
    for (ours, theirs) in [
        ("hard", "soft"),
        ("a rw,", "a ro,"),
        (",nosharecache", ""),
        ("vers=4.2", "vers=4.0"),
        ("nfs4 ", "nfs "),
        ("10.0.0.1:/", "10.0.0.2:/"),
        ("/srv/a", "/srv/b"),
        ("timeo=600", "timeo=50"),
        ("retrans=2", "retrans=9"),
        ("sec=sys", "sec=krb5"),
        ("local_lock=none", "local_lock=all"),
        ("proto=tcp", "proto=tcp,port=3049"),
        ("namlen=255", "namlen=255,nocto"),
        ("namlen=255", "namlen=255,softreval"),
        ("namlen=255", "namlen=255,lookupcache=pos"),
        ("namlen=255", "namlen=255,acregmax=600"),
    ] {
        let other = good.replacen(ours, theirs, 1);
        assert_ne!(other, good);
        assert!(matches!(on(&other), State::Other(_)), "{other}");
    }
    assert!(matches!(on("tmpfs none rw"), State::Other(_)));
    assert_eq!(mounts(root.path(), &[], "").state(&mount).unwrap(), State::Absent);

    let options = ["timeo=100", "rsize=65536"];
    let mount = share(&mounts(root.path(), &options, ""), "10.0.0.1", "/srv/a");
    let on = |own: &str, rest: &str| {
        let line =
            format!("40 25 0:38 / {} {own} - nfs4 10.0.0.1:/srv/a {rest}\n", mount.directory.display());
        mounts(root.path(), &options, &line).state(&mount).unwrap()
    };
    let (own, good) = (
        "rw,nosuid,nodev,noexec",
        "rw,vers=4.2,hard,nosharecache,rsize=32768,timeo=100,retrans=2,sec=sys,local_lock=none",
    );
    assert!(matches!(on(own, good), State::Mounted { .. }), "the server may have asked for smaller reads");
    assert!(matches!(on(own, &good.replace("timeo=100", "timeo=600")), State::Other(_)));
    for without in [",nosuid", ",nodev", ",noexec"] {
        assert!(matches!(on(&own.replace(without, ""), good), State::Other(_)), "{without}");
    }
}

/// F25: a process that the kernel does not let end keeps its share busy, and no other, and is told; once it has ended, all is
/// well.
#[tokio::test]
async fn f25_a_stuck_process_keeps_only_its_share_busy() {
    let root = tempfile::tempdir().unwrap();
    let mounts = mounts(root.path(), &[], "");
    let (one, two) = (share(&mounts, "10.0.0.1", "/srv/a"), share(&mounts, "10.0.0.2", "/srv/a"));
    let stuck = mounts.helpers.stuck.clone();
    let mut changes = stuck.changes();
    // One that no signal is sent to is as one that no signal ends.
    let hanging =
        CommandLine::new("/usr/bin/sleep").arg("600").deadline(Duration::from_millis(50)).never_kill();
    let error = hanging.run().await.unwrap_err();
    let CommandError::Deadline { stuck_pid: Some(pid), .. } = error else { panic!("{error}") };
    assert_eq!(Failure::from(mounts.told(&one, error)).reason, Reason::Stuck);
    let error = mounts.helpers.check_not_stuck(&one).unwrap_err();
    assert!(error.to_string().contains(&format!("process {pid} ")), "{error}");
    assert_eq!(Failure::from(error).reason, Reason::Stuck);
    mounts.helpers.check_not_stuck(&two).unwrap();
    let told = stuck.list();
    assert!(told.len() == 1 && told[0].starts_with("mount of 10.0.0.1:/srv/a at "), "{told:?}");

    changes.mark_unchanged();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
    tokio::time::timeout(Duration::from_secs(10), changes.changed()).await.expect("it has ended").unwrap();
    mounts.helpers.check_not_stuck(&one).unwrap();
}
