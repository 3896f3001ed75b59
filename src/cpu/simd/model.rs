//! Which kind of CPU this is, where kinds want memory asked for in different ways. It decides speed and no bit.

use std::sync::OnceLock;

/// Kinds of CPU that were measured and found to differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Model {
    /// Intel's.
    Intel,
    /// AMD's Zen 3.
    Zen3,
    /// AMD's Zen 4.
    Zen4,
    /// Any other.
    Other,
}

/// This CPU's; asked once.
pub(crate) fn model() -> Model {
    static FOUND: OnceLock<Model> = OnceLock::new();
    *FOUND.get_or_init(ask)
}

#[cfg(target_arch = "x86_64")]
fn ask() -> Model {
    use core::arch::x86_64::__cpuid;
    // SAFETY: every x86-64 has the instruction, and leaves 0 and 1. (Later compilers call it a safe function.)
    #[allow(unused_unsafe)]
    let (id, version) = unsafe { (__cpuid(0), __cpuid(1)) };
    let name: Vec<u8> = [id.ebx, id.edx, id.ecx]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    of(&name, version.eax)
}

#[cfg(not(target_arch = "x86_64"))]
fn ask() -> Model {
    Model::Other
}

/// From the vendor's name and the version word of leaf 1: base family in bits 8 to 11, base model in bits 4 to 7; bits 20 to 27 and 16 to 19 extend them.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
fn of(vendor: &[u8], version: u32) -> Model {
    let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    let model = (version >> 4 & 0xf) | (version >> 12 & 0xf0);
    match (vendor, family, model) {
        (b"GenuineIntel", ..) => Model::Intel,
        (b"AuthenticAMD", 0x19, 0x10..=0x1f | 0x60..=0x7f | 0xa0..=0xaf) => Model::Zen4,
        (b"AuthenticAMD", 0x19, _) => Model::Zen3,
        _ => Model::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_words_of_known_cpus() {
        for (vendor, version, expected) in [
            (b"AuthenticAMD", 0x00a1_0f11, Model::Zen4),  // Genoa
            (b"AuthenticAMD", 0x00aa_0f02, Model::Zen4),  // Bergamo
            (b"AuthenticAMD", 0x00a6_0f12, Model::Zen4),  // Raphael
            (b"AuthenticAMD", 0x00a0_0f11, Model::Zen3),  // Milan
            (b"AuthenticAMD", 0x00a2_0f10, Model::Zen3),  // Vermeer
            (b"AuthenticAMD", 0x00a5_0f00, Model::Zen3),  // Cezanne
            (b"AuthenticAMD", 0x00b0_0f21, Model::Other), // Turin: Zen 5
            (b"AuthenticAMD", 0x0083_0f10, Model::Other), // Rome: Zen 2
            (b"GenuineIntel", 0x000c_06f2, Model::Intel), // Emerald Rapids
            (b"HygonGenuine", 0x0090_0f02, Model::Other),
        ] {
            assert_eq!(of(vendor, version), expected, "{version:#x}");
        }
        assert_eq!(model(), ask());
    }
}
