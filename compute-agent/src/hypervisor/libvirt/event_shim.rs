//! The libvirt calls that the `virt` crate has no safe function for: subscribing to device-removed, device-removal-failed and
//! I/O error events, and detaching a device by its alias. The only unsafe code of the project.

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

/// libvirt's word on a device of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceEvent {
    /// The domain.
    pub(crate) domain: Uuid,
    /// The device.
    pub(crate) alias: String,
    /// What became of it.
    pub(crate) word: DeviceWord,
}

/// What became of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DeviceWord {
    /// It is gone.
    Removed,
    /// The guest does not let go of it.
    Refused,
    /// An I/O of the guest failed.
    IoError {
        /// What QEMU did: `VIR_DOMAIN_EVENT_IO_ERROR_…`.
        action: u32,
        /// Why, as far as QEMU says: `enospc` or nothing.
        reason: String,
    },
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type OfDevice = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);
type OfError = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    *const c_char,
    *const c_char,
    c_int,
    *const c_char,
    *mut c_void,
);

/// Has the events of all domains of a connection sent to `sender`, until [`unsubscribe`] with what this gives.
///
/// # Errors
/// libvirt's, when it does not take the subscription.
pub(crate) fn subscribe(
    connection: &Connect,
    sender: &broadcast::Sender<DeviceEvent>,
) -> Result<Vec<c_int>, Error> {
    let mut subscribed = Vec::new();
    // SAFETY: libvirt calls each with the arguments that it has for its event id, whatever the generic type says (libvirt's
    // documentation of VIR_DOMAIN_EVENT_CALLBACK, virConnectDomainEventDeviceRemovedCallback,
    // virConnectDomainEventDeviceRemovalFailedCallback and virConnectDomainEventIOErrorReasonCallback).
    let events: [(u32, Generic); 3] = unsafe {
        [
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, transmute::<OfDevice, Generic>(removed)),
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, transmute::<OfDevice, Generic>(removal_failed)),
            (sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, transmute::<OfError, Generic>(io_error)),
        ]
    };
    for (event, callback) in events {
        let opaque = Box::into_raw(Box::new(sender.clone())).cast::<c_void>();
        // SAFETY: the connection is open while `connection` is borrowed. libvirt gives `opaque` to `free` exactly once after the
        // last call.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                ptr::null_mut(),
                event as c_int,
                Some(callback),
                opaque,
                Some(free),
            )
        };
        if id < 0 {
            // SAFETY: libvirt did not take `opaque`, so it is still ours alone.
            unsafe { free(opaque) };
            let error = Error::last_error();
            unsubscribe(connection, &subscribed);
            return Err(error);
        }
        subscribed.push(id);
    }
    Ok(subscribed)
}

/// Ends subscriptions. Each holds on to its connection: one that broke would stay for ever with them.
pub(crate) fn unsubscribe(connection: &Connect, subscribed: &[c_int]) {
    for id in subscribed {
        // SAFETY: the connection is open while `connection` is borrowed, and the number is one that libvirt gave for it.
        let outcome = unsafe { sys::virConnectDomainEventDeregisterAny(connection.as_ptr(), *id) };
        if outcome < 0 {
            // The other end is gone and cannot be told; the callback is.
            tracing::debug!(message = Error::last_error().message(), "libvirt's events were not ended there");
        }
    }
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
    unsafe { tell(domain, alias, opaque, DeviceWord::Removed) }
}

unsafe extern "C" fn removal_failed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's own arguments, passed on as they came.
    unsafe { tell(domain, alias, opaque, DeviceWord::Refused) }
}

unsafe extern "C" fn io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _source: *const c_char,
    alias: *const c_char,
    action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt gives C strings that live as long as the callback, or none.
    let reason = match reason.is_null() {
        true => String::new(),
        false => unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned(),
    };
    let word = DeviceWord::IoError { action: action.unsigned_abs(), reason };
    // SAFETY: libvirt's own arguments, passed on as they came.
    unsafe { tell(domain, alias, opaque, word) }
}

/// # Safety
/// To be called with the arguments of a device event whose `opaque` is a sender that [`subscribe`] boxed.
unsafe fn tell(domain: sys::virDomainPtr, alias: *const c_char, opaque: *mut c_void, word: DeviceWord) {
    let mut uuid = [0u8; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: `domain` is valid during the callback and the buffer has the length that libvirt wants.
    let outcome = unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) };
    if outcome < 0 || alias.is_null() {
        return;
    }
    // SAFETY: libvirt gives a C string that lives as long as the callback.
    let alias = unsafe { CStr::from_ptr(alias) }.to_string_lossy().into_owned();
    // SAFETY: `opaque` is the box that `subscribe` made; it is freed only after the last callback.
    let sender = unsafe { &*opaque.cast::<broadcast::Sender<DeviceEvent>>() };
    // Nobody may be waiting.
    drop(sender.send(DeviceEvent { domain: Uuid::from_bytes(uuid), alias, word }));
}

/// # Safety
/// To be called once with the box that [`subscribe`] made.
unsafe extern "C" fn free(opaque: *mut c_void) {
    // SAFETY: as above.
    drop(unsafe { Box::from_raw(opaque.cast::<broadcast::Sender<DeviceEvent>>()) });
}
