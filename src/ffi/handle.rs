//! Opaque handles: a box with a mark of its kind and a lock that refuses instead of waiting.

use super::status::*;
use core::ops::{Deref, DerefMut};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

/// A type of the header that stands for a boxed [`Object`].
pub(super) trait Handle {
    /// What the box holds.
    type Value;
    /// The C name.
    const NAME: &'static str;
    /// Tells the kinds apart.
    const TAG: u64;
}

/// What a handle points at.
#[repr(C)]
struct Object<V> {
    /// First, so that a handle of another kind is read at the same place.
    tag: u64,
    lock: RwLock<V>,
}

/// A destroyed handle's tag, for as long as nobody reuses its memory.
const DESTROYED: u64 = 0xdead_dead_dead_dead;

/// A value for reading; several calls may hold it at a time.
pub(super) struct Shared<'a, V>(RwLockReadGuard<'a, V>);

impl<V> Deref for Shared<'_, V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.0
    }
}

/// A value to change; no other call holds it.
pub(super) struct Exclusive<'a, V>(RwLockWriteGuard<'a, V>);

impl<V> Deref for Exclusive<'_, V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.0
    }
}

impl<V> DerefMut for Exclusive<'_, V> {
    fn deref_mut(&mut self) -> &mut V {
        &mut self.0
    }
}

/// Boxes a value and gives its handle to `*out`.
///
/// # Safety
/// `out` is null, or points to a place for a pointer.
pub(super) unsafe fn give<H: Handle>(out: *mut *mut H, value: H::Value) -> Checked {
    // SAFETY: this function's contract.
    unsafe { check_place(out) }?;
    let object = Object {
        tag: H::TAG,
        lock: RwLock::new(value),
    };
    // SAFETY: `check_place` found it usable.
    unsafe { out.write(Box::into_raw(Box::new(object)).cast()) };
    Ok(())
}

/// Whether a handle could be written to `out`: to be asked before a costly value is made.
///
/// # Safety
/// As [`give`].
pub(super) unsafe fn check_place<H: Handle>(out: *mut *mut H) -> Checked {
    if out.is_null() {
        return Err(Fault::new(
            MOE_ERROR_NULL,
            format_args!("out: a place for a {} is NULL", H::NAME),
        ));
    }
    if !out.is_aligned() {
        return Err(Fault::new(MOE_ERROR_MISALIGNED, "out: misaligned pointer"));
    }
    Ok(())
}

/// The object behind a handle.
///
/// # Safety
/// `handle` is null or came from [`give`] (of any kind) and was not destroyed; it stays so for `'a`.
unsafe fn object<'a, H: Handle>(handle: *const H) -> Checked<&'a Object<H::Value>> {
    let name = H::NAME;
    if handle.is_null() {
        return Err(Fault::new(
            MOE_ERROR_NULL,
            format_args!("{name}: handle is NULL"),
        ));
    }
    let object = handle.cast::<Object<H::Value>>();
    if !object.is_aligned() {
        return Err(Fault::new(
            MOE_ERROR_HANDLE,
            format_args!("{name}: not a handle"),
        ));
    }
    // SAFETY: by the contract an object of some kind is there, and all kinds begin with their tag.
    let tag = unsafe { object.cast::<u64>().read() };
    if tag != H::TAG {
        let what = match tag {
            DESTROYED => "a destroyed handle",
            _ => "a handle of another kind",
        };
        return Err(Fault::new(MOE_ERROR_HANDLE, format_args!("{name}: {what}")));
    }
    // SAFETY: the tag says that `give` made it for H, and the contract that it lives.
    Ok(unsafe { &*object })
}

fn refused<G>(name: &str, why: TryLockError<G>) -> Fault {
    match why {
        TryLockError::WouldBlock => Fault::new(
            MOE_ERROR_BUSY,
            format_args!("{name}: in use by another call"),
        ),
        TryLockError::Poisoned(_) => Fault::new(
            MOE_ERROR_INTERNAL,
            format_args!("{name}: a call that changed it has failed inside; destroy it"),
        ),
    }
}

/// Borrows a handle's value for reading.
///
/// # Safety
/// `handle` is null or a living handle of any kind; nobody destroys it during the call.
pub(super) unsafe fn shared<'a, H: Handle>(handle: *const H) -> Checked<Shared<'a, H::Value>> {
    // SAFETY: this function's contract.
    let object = unsafe { object(handle) }?;
    let guard = object
        .lock
        .try_read()
        .map_err(|why| refused(H::NAME, why))?;
    Ok(Shared(guard))
}

/// Borrows a handle's value to change it.
///
/// # Safety
/// As [`shared`].
pub(super) unsafe fn exclusive<'a, H: Handle>(handle: *mut H) -> Checked<Exclusive<'a, H::Value>> {
    // SAFETY: this function's contract.
    let object = unsafe { object(handle.cast_const()) }?;
    let guard = object
        .lock
        .try_write()
        .map_err(|why| refused(H::NAME, why))?;
    Ok(Exclusive(guard))
}

/// Takes the value out of a handle, which is no handle any more. The value of a handle that is in use stays.
///
/// # Safety
/// As [`shared`].
pub(super) unsafe fn take<H: Handle>(handle: *mut H) -> Checked<H::Value> {
    // SAFETY: this function's contract.
    match unsafe { object(handle.cast_const()) }?.lock.try_write() {
        Err(why @ TryLockError::WouldBlock) => return Err(refused(H::NAME, why)),
        Err(TryLockError::Poisoned(_)) | Ok(_) => {}
    }
    // SAFETY: `object` found a living handle of this kind, whose box came from `give`.
    let mut object = unsafe { Box::from_raw(handle.cast::<Object<H::Value>>()) };
    object.tag = DESTROYED;
    // The mark has to reach memory although the box goes.
    core::hint::black_box(&object.tag);
    Ok(object
        .lock
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// Destroys a handle; null is allowed.
///
/// # Safety
/// As [`shared`].
pub(super) unsafe fn destroy<H: Handle>(handle: *mut H) -> Checked {
    if !handle.is_null() {
        // SAFETY: this function's contract.
        drop(unsafe { take(handle) }?);
    }
    Ok(())
}

/// The type of the header and its kind.
macro_rules! handle {
    ($name:ident, $value:ty, $tag:literal) => {
        impl $crate::ffi::handle::Handle for $name {
            type Value = $value;
            const NAME: &'static str = stringify!($name);
            const TAG: u64 = u64::from_le_bytes(*$tag);
        }
    };
}
pub(super) use handle;
