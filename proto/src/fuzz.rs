//! What a fuzzer gives to the parsers of this crate; only in a build for `tests/run fuzz`.

use prost::Message;

use crate::{
    AttachmentId, ByteSize, ConnectionInfo, Connector, DiskOptions, DomainName, FileName, FileSystemId, Iqn,
    PoolName, Portal, Secret, Serial, ServerAddress, SharePath, VolumeKey, Wwn, wire,
};

/// A message from the wire, into what the agents work with, and back.
pub fn message(data: &[u8]) {
    if let Ok(request) = wire::AttachRequest::decode(data) {
        let printed = format!("{request:?}");
        if let Some(info) = &request.connection_info
            && let Ok(parsed) = ConnectionInfo::try_from(info)
        {
            let again = ConnectionInfo::try_from(&wire::ConnectionInfo::from(&parsed));
            assert_eq!(again.ok().as_ref(), Some(&parsed), "a connection goes both ways");
            if let crate::Transport::Iscsi(iscsi) = &parsed.transport {
                // A name may be the secret's text; the secret itself is never printed.
                assert!(printed.contains("not shown"), "{} {printed}", iscsi.target_iqn);
            }
        }
        drop(request.disk.as_ref().map(DiskOptions::try_from));
    }
    if let Ok(request) = wire::ExportRequest::decode(data)
        && let Some(Ok(connector)) = request.connector.as_ref().map(Connector::try_from)
    {
        assert_eq!(Connector::try_from(&wire::Connector::from(&connector)).ok(), Some(connector));
    }
}

/// A name, number or address, of every kind that there is. What is taken is shown as it can be read again.
pub fn names(text: &str) {
    macro_rules! reads_back {
        ($($kind:ty),*) => {$(
            if let Ok(value) = text.parse::<$kind>() {
                assert_eq!(value.to_string().parse::<$kind>().ok(), Some(value), stringify!($kind));
            }
        )*};
    }
    reads_back!(
        AttachmentId,
        DomainName,
        FileName,
        FileSystemId,
        Iqn,
        PoolName,
        Portal,
        Serial,
        ServerAddress,
        SharePath,
        VolumeKey,
        Wwn
    );
    drop((text.parse::<ByteSize>(), Secret::new(text)));
}
