//! The numbers of a tensor on the CPU, as a slice, for kernels written in Rust. Since 1.1.
//!
//! As everywhere in tch, a tensor is a handle, and the compiler does not see when two of them share their numbers: while a
//! slice lives, its tensor's numbers must not be changed, freed or resized through another handle. A kernel that takes its
//! slices, computes and returns keeps that rule by itself.

use tch::{Device, Kind, Tensor};

pub use half::bf16;

/// A floating-point number that kernels read and write; they compute in f32.
pub trait Element: Copy + Default + Send + Sync + sealed::Sealed + 'static {
    /// The dtype of a tensor of these.
    const KIND: Kind;
    /// The same number in f32.
    fn widen(self) -> f32;
    /// The nearest of these to a number in f32.
    fn narrow(x: f32) -> Self;
}

mod sealed {
    /// Every pattern of its bits is a number, and it is what libtorch keeps for its dtype.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> f32 {
        x
    }
}

impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // Without a branch, so that compilers vectorise it: round to nearest even, and keep what is no number.
    #[inline(always)]
    fn narrow(x: f32) -> bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        bf16::from_bits(if x.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
    }
}

/// The numbers of a contiguous tensor on the CPU, in the order of its dimensions.
///
/// ```
/// let x = jepa_plugin_api::tch::Tensor::from_slice(&[1.0f32, 2.0]);
/// assert_eq!(jepa_plugin_api::memory::values::<f32>(&x), [1.0, 2.0]);
/// ```
///
/// # Panics
/// When the tensor is elsewhere, of another dtype, or not contiguous.
pub fn values<T: Element>(x: &Tensor) -> &[T] {
    check::<T>(x);
    match x.numel() {
        0 => &[],
        // SAFETY: the tensor has that many numbers of T one after the other, and lives as long as the borrow. That no
        // other handle changes them meanwhile is the rule above.
        count => unsafe { std::slice::from_raw_parts(x.data_ptr().cast::<T>(), count) },
    }
}

/// The same, to be changed. For a tensor of one's own: nobody may read or change it meanwhile through another handle.
///
/// # Panics
/// As [`values`].
pub fn values_mut<T: Element>(x: &mut Tensor) -> &mut [T] {
    check::<T>(x);
    match x.numel() {
        0 => &mut [],
        // SAFETY: as above, and no other handle reads them.
        count => unsafe { std::slice::from_raw_parts_mut(x.data_ptr().cast::<T>(), count) },
    }
}

/// A new tensor of this shape on the CPU, filled by `fill`, which has to write every number.
pub fn filled<T: Element>(shape: &[i64], fill: impl FnOnce(&mut [T])) -> Tensor {
    let mut tensor = Tensor::empty(shape, (T::KIND, Device::Cpu));
    fill(values_mut(&mut tensor));
    tensor
}

fn check<T: Element>(x: &Tensor) {
    assert!(
        x.device() == Device::Cpu && x.kind() == T::KIND && x.is_contiguous(),
        "a kernel was given a tensor of {:?} on {:?}{} where it takes a contiguous one of {:?} on the CPU",
        x.kind(),
        x.device(),
        if x.is_contiguous() { "" } else { ", not contiguous," },
        T::KIND
    );
}

/// Runs `kernel` compiled for the vector instructions that this machine has. The closure and what it calls must be
/// `#[inline(always)]`: what is not inlined is compiled for the oldest machine, where a `mul_add` is a call.
#[inline(always)]
pub fn vectorized<R>(kernel: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(kernel)
}
