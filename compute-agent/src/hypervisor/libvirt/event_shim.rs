//! The three libvirt calls that the `virt` crate has no safe function for: subscribing to device-removed and
//! device-removal-failed events, and detaching a device by its alias. The only unsafe code of the project.

#![expect(unsafe_code, reason = "libvirt's C API for what the virt crate does not offer")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::transmute;
use std::ptr;

use tokio::sync::broadcast;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

/// libvirt's word on an unplug.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnplugEvent {
    /// The domain.
    pub(crate) domain: Uuid,
    /// The device.
    pub(crate) alias: String,
    /// True: it is gone. False: the guest refused.
    pub(crate) removed: bool,
}

type Callback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);

/// Has the events of all domains of a connection sent to `sender`, until the connection is closed.
///
/// # Errors
/// libvirt's, when it does not take the subscription.
pub(crate) fn subscribe(connection: &Connect, sender: &broadcast::Sender<UnplugEvent>) -> Result<(), Error> {
    let events: [(u32, Callback); 2] = [
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, removed),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, removal_failed),
    ];
    for (event, callback) in events {
        let opaque = Box::into_raw(Box::new(sender.clone())).cast::<c_void>();
        // SAFETY: the connection is open while `connection` is borrowed. libvirt calls `callback` with the four
        // arguments that it has for these two event ids, whatever the generic type says (libvirt's documentation of
        // VIR_DOMAIN_EVENT_CALLBACK), and gives `opaque` to `free` exactly once after the last call.
        let id = unsafe {
            let generic = transmute::<
                Callback,
                unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
            >(callback);
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                ptr::null_mut(),
                event as c_int,
                Some(generic),
                opaque,
                Some(free),
            )
        };
        if id < 0 {
            // SAFETY: libvirt did not take `opaque`, so it is still ours alone.
            unsafe { free(opaque) };
            return Err(Error::last_error());
        }
    }
    Ok(())
}

/// Asks for a device to be unplugged, by its alias, and does not wait for the guest.
///
/// # Errors
/// libvirt's.
pub(crate) fn detach_alias(domain: &Domain, alias: &str, flags: u32) -> Result<(), Error> {
    let alias = CString::new(alias)?;
    // SAFETY: the domain is open while `domain` is borrowed, and `alias` is a C string that outlives the call.
    let outcome = unsafe { sys::virDomainDetachDeviceAlias(domain.as_ptr(), alias.as_ptr(), flags) };
    if outcome < 0 { Err(Error::last_error()) } else { Ok(()) }
}

unsafe extern "C" fn removed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's own arguments, passed on as they came.
    unsafe { tell(domain, alias, opaque, true) }
}

unsafe extern "C" fn removal_failed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's own arguments, passed on as they came.
    unsafe { tell(domain, alias, opaque, false) }
}

/// # Safety
/// To be called with the arguments of a device event whose `opaque` is a sender that [`subscribe`] boxed.
unsafe fn tell(domain: sys::virDomainPtr, alias: *const c_char, opaque: *mut c_void, removed: bool) {
    let mut uuid = [0u8; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: `domain` is valid during the callback and the buffer has the length that libvirt wants.
    let outcome = unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) };
    if outcome < 0 || alias.is_null() {
        return;
    }
    // SAFETY: libvirt gives a C string that lives as long as the callback.
    let alias = unsafe { CStr::from_ptr(alias) }.to_string_lossy().into_owned();
    // SAFETY: `opaque` is the box that `subscribe` made; it is freed only after the last callback.
    let sender = unsafe { &*opaque.cast::<broadcast::Sender<UnplugEvent>>() };
    // Nobody may be waiting.
    drop(sender.send(UnplugEvent { domain: Uuid::from_bytes(uuid), alias, removed }));
}

/// # Safety
/// To be called once with the box that [`subscribe`] made.
unsafe extern "C" fn free(opaque: *mut c_void) {
    // SAFETY: as above.
    drop(unsafe { Box::from_raw(opaque.cast::<broadcast::Sender<UnplugEvent>>()) });
}
