//! Element types of tensors, as safetensors and GGUF name them.

use std::fmt;

use serde::{Serialize, Serializer};

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $elements:literal $bits:literal)*) => {
        /// Element type of a tensor. The variants are called as the formats call them.
        ///
        /// safetensors: <https://github.com/huggingface/safetensors>; GGUF: `ggml_type` and the block structures of ggml,
        /// <https://github.com/ggml-org/ggml>.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(non_camel_case_types)]
        #[non_exhaustive]
        pub enum Dtype { $($(#[$doc])* $variant,)* }

        impl Dtype {
            /// Its name in the formats, such as `BF16` or `Q4_K`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }

            /// The type of this name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Some(match name { $(stringify!($variant) => Self::$variant,)* _ => return None })
            }

            /// What is stored together: how many elements make a block, and how many bits a block takes. Plain types
            /// have blocks of one element.
            #[must_use]
            pub const fn block(self) -> (u64, u64) {
                match self { $(Self::$variant => ($elements, $bits),)* }
            }

            /// All of them.
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$variant,)*];
        }
    };
}

dtypes! {
    /// One byte, zero or one.
    BOOL 1 8
    /// 4-bit float (MXFP4's element).
    F4 1 4
    /// 6-bit float, two bits of exponent.
    F6_E2M3 1 6
    /// 6-bit float, three bits of exponent.
    F6_E3M2 1 6
    /// Unsigned byte.
    U8 1 8
    /// Signed byte.
    I8 1 8
    /// 8-bit float, five bits of exponent.
    F8_E5M2 1 8
    /// 8-bit float, four bits of exponent.
    F8_E4M3 1 8
    /// 8-bit power of two, a scale.
    F8_E8M0 1 8
    /// As `F8_E4M3`, without infinities and negative zero.
    F8_E4M3FNUZ 1 8
    /// As `F8_E5M2`, without infinities and negative zero.
    F8_E5M2FNUZ 1 8
    /// Signed, 16 bits.
    I16 1 16
    /// Unsigned, 16 bits.
    U16 1 16
    /// IEEE half precision.
    F16 1 16
    /// bfloat16.
    BF16 1 16
    /// Signed, 32 bits.
    I32 1 32
    /// Unsigned, 32 bits.
    U32 1 32
    /// IEEE single precision.
    F32 1 32
    /// Complex, two singles.
    C64 1 64
    /// IEEE double precision.
    F64 1 64
    /// Signed, 64 bits.
    I64 1 64
    /// Unsigned, 64 bits.
    U64 1 64
    /// ggml, 4 bits with one scale.
    Q4_0 32 144
    /// ggml, 4 bits with scale and minimum.
    Q4_1 32 160
    /// ggml, 5 bits with one scale.
    Q5_0 32 176
    /// ggml, 5 bits with scale and minimum.
    Q5_1 32 192
    /// ggml, 8 bits with one scale.
    Q8_0 32 272
    /// ggml, 8 bits with scale and sum.
    Q8_1 32 320
    /// ggml k-quant, 2 bits.
    Q2_K 256 672
    /// ggml k-quant, 3 bits.
    Q3_K 256 880
    /// ggml k-quant, 4 bits.
    Q4_K 256 1152
    /// ggml k-quant, 5 bits.
    Q5_K 256 1408
    /// ggml k-quant, 6 bits.
    Q6_K 256 1680
    /// ggml k-quant, 8 bits.
    Q8_K 256 2336
    /// ggml i-quant, 2.06 bits.
    IQ2_XXS 256 528
    /// ggml i-quant, 2.31 bits.
    IQ2_XS 256 592
    /// ggml i-quant, 3.06 bits.
    IQ3_XXS 256 784
    /// ggml i-quant, 1.56 bits.
    IQ1_S 256 400
    /// ggml i-quant, 4.5 bits, not linear.
    IQ4_NL 32 144
    /// ggml i-quant, 3.44 bits.
    IQ3_S 256 880
    /// ggml i-quant, 2.56 bits.
    IQ2_S 256 656
    /// ggml i-quant, 4.25 bits.
    IQ4_XS 256 1088
    /// ggml i-quant, 1.75 bits.
    IQ1_M 256 448
    /// ggml ternary, 1.69 bits.
    TQ1_0 256 432
    /// ggml ternary, 2.06 bits.
    TQ2_0 256 528
    /// Microscaling 4-bit float, a scale for 32.
    MXFP4 32 136
    /// NVIDIA's 4-bit float, a scale for 16, in blocks of 64.
    NVFP4 64 288
}

impl Dtype {
    /// The bytes that so many elements take; `None` past 64 bits, or where they don't end with a block and a byte.
    #[must_use]
    pub fn bytes_of(self, elements: u64) -> Option<u64> {
        let (block, bits) = self.block();
        let bits = (elements / block).checked_mul(bits)?;
        (elements.is_multiple_of(block) && bits.is_multiple_of(8)).then_some(bits / 8)
    }

    /// The type with this number in GGUF files.
    #[must_use]
    pub const fn from_ggml(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            9 => Self::Q8_1,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            15 => Self::Q8_K,
            16 => Self::IQ2_XXS,
            17 => Self::IQ2_XS,
            18 => Self::IQ3_XXS,
            19 => Self::IQ1_S,
            20 => Self::IQ4_NL,
            21 => Self::IQ3_S,
            22 => Self::IQ2_S,
            23 => Self::IQ4_XS,
            24 => Self::I8,
            25 => Self::I16,
            26 => Self::I32,
            27 => Self::I64,
            28 => Self::F64,
            29 => Self::IQ1_M,
            30 => Self::BF16,
            34 => Self::TQ1_0,
            35 => Self::TQ2_0,
            39 => Self::MXFP4,
            40 => Self::NVFP4,
            _ => return None,
        })
    }
}

impl Serialize for Dtype {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_name() {
        for &dtype in Dtype::ALL {
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("bf16"), None);
    }

    #[test]
    fn bytes_come_in_whole_blocks() {
        assert_eq!(Dtype::BF16.bytes_of(3), Some(6));
        assert_eq!(Dtype::F4.bytes_of(4), Some(2));
        assert_eq!(Dtype::F4.bytes_of(3), None);
        assert_eq!(Dtype::Q4_K.bytes_of(512), Some(288));
        assert_eq!(Dtype::Q4_K.bytes_of(300), None);
        assert_eq!(Dtype::F64.bytes_of(u64::MAX), None);
    }

    #[test]
    fn safetensors_has_no_type_that_is_missing_here() {
        use safetensors::Dtype as Theirs;
        for theirs in [
            Theirs::BOOL,
            Theirs::F4,
            Theirs::F6_E2M3,
            Theirs::F6_E3M2,
            Theirs::F8_E8M0,
            Theirs::F8_E4M3,
            Theirs::F8_E5M2,
            Theirs::F8_E4M3FNUZ,
            Theirs::F8_E5M2FNUZ,
            Theirs::BF16,
            Theirs::C64,
            Theirs::U64,
        ] {
            let ours = Dtype::from_name(&format!("{theirs:?}")).unwrap();
            assert_eq!(ours.block(), (1, theirs.bitsize() as u64));
        }
    }
}
