//! A storage host whose system is lost while its disks live: installed anew, with the config, the certificates and the journal
//! from a backup, as the README says under "Backup and recovery". Not here: hosts that are only booted anew (`reboots`), a
//! hypervisor that is lost (`force`).

use std::time::Duration;

use tether_tests::Down;
use tether_tests::agents::PACKAGES;

use crate::reboots::{PIECE, Writer, wanted};
use crate::share::attachment;
use crate::{Fixture, text};

mod long {
    use super::*;

    /// F22: two guests write, one over each transport. Of the storage host everything of the agent is lost, and all that the
    /// kernel had; from the backup it comes back, the guests go on, and lose nothing.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f22_a_storage_host_that_is_installed_anew_goes_on_from_the_backup_of_its_journal() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let mut attached = Vec::new();
        for (volume, guest, path) in
            [("thick/kept", "c2", "/dev/tether/kept"), ("share/kept", "c3", "/srv/share/kept.raw")]
        {
            let serial = text(&fixture.create(volume, "64M", &[]).await, "/serial").to_owned();
            let id = text(&fixture.attach(&[volume, guest]).await, "/attachment_id").to_owned();
            let disk = fixture.sees(guest, &serial).await;
            let guest = fixture.lab.guest(guest).unwrap();
            let mut writer = Writer::start(guest.clone(), disk.clone());
            writer.more(2).await;
            attached.push((id, guest, disk, path, writer));
        }
        // The agent runs meanwhile.
        storage
            .run("tar -C / -czf /var/tmp/backup.tgz etc/tether etc/exports.d var/lib/tether")
            .await
            .unwrap();
        let lost = "systemctl kill --signal=KILL tether-storage-agent; systemctl stop tether-storage-agent; \
                    rm -rf /etc/tether /var/lib/tether /etc/exports.d/tether-*; systemctl disable -q nfs-server; \
                    TETHER_REMOVE_IN_USE=yes dpkg --purge tether-storage-agent; sync";
        storage.run_within(lost, Duration::from_secs(120)).await.expect("everything of the agent is gone");
        fixture.lab.reboot(storage, Down::ByPowerCut).await.unwrap();
        let again = format!("cd {PACKAGES} && dpkg -i tether-storage-agent_*.deb");
        storage.run_within(&again, Duration::from_secs(180)).await.unwrap();
        storage
            .run("tar -C / -xzf /var/tmp/backup.tgz && systemctl enable -q --now nfs-server tether-storage-agent")
            .await
            .unwrap();
        for (id, guest, disk, path, mut writer) in attached {
            writer.more(4).await;
            let pieces = writer.finish().await;
            assert!(attachment(&fixture, &id).await.connected);
            let (sum, bytes) = (wanted(&fixture, pieces).await, pieces * PIECE);
            assert_eq!(guest.checksum(&disk, bytes).await.unwrap(), sum, "in the guest {}", guest.name);
            fixture.detach(&id).await;
            assert_eq!(crate::checksum_of(storage, path, 0, bytes).await, sum, "{path}");
        }
        fixture.assert_nothing_left("after the detaches").await;
    }
}
