//! A fuzzer's bytes as choices. When they run out every choice is the first one.

pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes([(); 4].map(|()| self.u8()))
    }

    /// 0 .. n, n at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n.max(1)
    }

    /// Once in `n` times.
    pub fn rarely(&mut self, n: u8) -> bool {
        self.u8() % n == n - 1
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A size that should be `right`: mostly it is, else nearly, else anything small, else beyond all memory. Nothing between, which would only be slow.
    pub fn size(&mut self, right: usize) -> usize {
        match self.u8() {
            0..=229 => right,
            230..=236 => right.wrapping_add(1),
            237..=243 => right.saturating_sub(1),
            244..=249 => self.below(70),
            _ => self.pick(&[usize::MAX, isize::MAX as usize, 1 << 62, 1 << 40, 0]),
        }
    }

    /// A constant that should be below `n`.
    pub fn constant(&mut self, n: usize) -> u32 {
        match self.u8() {
            255 => self.u32(),
            v => u32::from(v) % n as u32,
        }
    }

    /// A number: ordinary, special, or any bits.
    pub fn f32(&mut self) -> f32 {
        match self.u8() {
            0..=199 => f32::from(self.u8() as i8) / 16.0,
            200..=229 => self.pick(&[
                0.0,
                -0.0,
                1.0,
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::MAX,
                1e-45,
            ]),
            _ => f32::from_bits(self.u32()),
        }
    }
}
