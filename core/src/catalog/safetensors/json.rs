//! A strict reader for the little JSON that safetensors headers are made of.
//!
//! Headers come in hundreds of kilobytes and a scan reads tens of thousands of them, so this walks the bytes once and
//! borrows every string that has no escapes. It is as strict as a general JSON parser; a test holds it against one.

use std::borrow::Cow;

use super::HeaderError;

/// Nesting that is tolerated in fields that no reader knows. Real headers need three levels.
const MAX_DEPTH: usize = 32;

/// A place in the header's bytes.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn error(&self, expected: &'static str) -> HeaderError {
        HeaderError::Json {
            offset: self.at as u64,
            expected,
        }
    }

    pub(super) fn offset(&self) -> usize {
        self.at
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    pub(super) fn skip_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    /// The next byte that is no white space, without taking it.
    pub(super) fn next_token(&mut self) -> Option<u8> {
        self.skip_space();
        self.peek()
    }

    pub(super) fn expect(&mut self, byte: u8, expected: &'static str) -> Result<(), HeaderError> {
        if self.next_token() == Some(byte) {
            self.at += 1;
            Ok(())
        } else {
            Err(self.error(expected))
        }
    }

    /// Takes `byte` if it comes next.
    pub(super) fn take(&mut self, byte: u8) -> bool {
        let found = self.next_token() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// After a member: whether another one follows. `close` ends the list.
    pub(super) fn another(&mut self, close: u8) -> Result<bool, HeaderError> {
        match self.next_token() {
            Some(b',') => {
                self.at += 1;
                Ok(true)
            }
            Some(byte) if byte == close => {
                self.at += 1;
                Ok(false)
            }
            _ => Err(self.error("`,` or the end of the list")),
        }
    }

    pub(super) fn end(&mut self) -> Result<(), HeaderError> {
        match self.next_token() {
            None => Ok(()),
            Some(_) => Err(self.error("nothing after the header's last brace")),
        }
    }

    pub(super) fn string(&mut self) -> Result<Cow<'a, str>, HeaderError> {
        self.expect(b'"', "a string")?;
        let start = self.at;
        let rest = &self.bytes[start..];
        // Names are short: a byte loop beats a vector search that must be set up for each of them.
        let plain = rest
            .iter()
            .position(|&b| b == b'"' || b == b'\\' || b < 0x20)
            .ok_or_else(|| self.error("the end of a string"))?;
        if rest[plain] == b'"' {
            self.at = start + plain + 1;
            return self.utf8(start, start + plain).map(Cow::Borrowed);
        }
        self.string_with_escapes(start)
    }

    fn utf8(&self, start: usize, end: usize) -> Result<&'a str, HeaderError> {
        std::str::from_utf8(&self.bytes[start..end]).map_err(|error| HeaderError::Json {
            offset: (start + error.valid_up_to()) as u64,
            expected: "UTF-8 text",
        })
    }

    fn string_with_escapes(&mut self, start: usize) -> Result<Cow<'a, str>, HeaderError> {
        let mut text = String::new();
        let mut plain = start;
        self.at = start;
        loop {
            match self.peek() {
                None => return Err(self.error("the end of a string")),
                Some(b'"') => {
                    text.push_str(self.utf8(plain, self.at)?);
                    self.at += 1;
                    return Ok(Cow::Owned(text));
                }
                Some(b'\\') => {
                    text.push_str(self.utf8(plain, self.at)?);
                    self.at += 1;
                    let escaped = self.escape()?;
                    text.push(escaped);
                    plain = self.at;
                }
                Some(0..0x20) => return Err(self.error("no bare control character in a string")),
                Some(_) => self.at += 1,
            }
        }
    }

    fn escape(&mut self) -> Result<char, HeaderError> {
        let byte = self
            .peek()
            .ok_or_else(|| self.error("an escaped character"))?;
        self.at += 1;
        Ok(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.hex4()?;
                let code = match first {
                    0xd800..0xdc00 => {
                        if self.peek() != Some(b'\\') || self.bytes.get(self.at + 1) != Some(&b'u')
                        {
                            return Err(self.error("the second half of a surrogate pair"));
                        }
                        self.at += 2;
                        let second = self.hex4()?;
                        if !(0xdc00..0xe000).contains(&second) {
                            return Err(self.error("the second half of a surrogate pair"));
                        }
                        0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
                    }
                    code => code,
                };
                char::from_u32(code).ok_or_else(|| self.error("a Unicode character"))?
            }
            _ => return Err(self.error("a JSON escape")),
        })
    }

    fn hex4(&mut self) -> Result<u32, HeaderError> {
        let digits = self
            .bytes
            .get(self.at..self.at + 4)
            .ok_or_else(|| self.error("four hexadecimal digits"))?;
        let mut code = 0;
        for &digit in digits {
            let value = char::from(digit)
                .to_digit(16)
                .ok_or_else(|| self.error("four hexadecimal digits"))?;
            code = code * 16 + value;
        }
        self.at += 4;
        Ok(code)
    }

    /// A whole number without sign, fraction or exponent.
    pub(super) fn number(&mut self) -> Result<u64, HeaderError> {
        self.skip_space();
        let start = self.at;
        let mut value: u64 = 0;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            value = value
                .checked_mul(10)
                .and_then(|v| v.checked_add(u64::from(digit - b'0')))
                .ok_or_else(|| self.error("a number of at most 64 bits"))?;
            self.at += 1;
        }
        let digits = self.at - start;
        if digits == 0 || (digits > 1 && self.bytes[start] == b'0') {
            self.at = start;
            return Err(self.error("a whole number"));
        }
        if let Some(b'.' | b'e' | b'E') = self.peek() {
            return Err(self.error("a whole number"));
        }
        Ok(value)
    }

    pub(super) fn literal(&mut self, word: &'static str) -> Result<(), HeaderError> {
        self.skip_space();
        if self.bytes[self.at..].starts_with(word.as_bytes()) {
            self.at += word.len();
            Ok(())
        } else {
            Err(self.error(word))
        }
    }

    /// Steps over one value of any kind, to a bounded depth.
    pub(super) fn skip_value(&mut self, depth: usize) -> Result<(), HeaderError> {
        if depth >= MAX_DEPTH {
            return Err(self.error("less deeply nested values"));
        }
        match self.next_token() {
            Some(b'"') => self.string().map(drop),
            Some(b'{') => {
                self.at += 1;
                if self.take(b'}') {
                    return Ok(());
                }
                loop {
                    self.string()?;
                    self.expect(b':', "`:`")?;
                    self.skip_value(depth + 1)?;
                    if !self.another(b'}')? {
                        return Ok(());
                    }
                }
            }
            Some(b'[') => {
                self.at += 1;
                if self.take(b']') {
                    return Ok(());
                }
                loop {
                    self.skip_value(depth + 1)?;
                    if !self.another(b']')? {
                        return Ok(());
                    }
                }
            }
            Some(b't') => self.literal("true"),
            Some(b'f') => self.literal("false"),
            Some(b'n') => self.literal("null"),
            Some(b'-' | b'0'..=b'9') => self.skip_number(),
            _ => Err(self.error("a value")),
        }
    }

    fn skip_number(&mut self) -> Result<(), HeaderError> {
        self.at += usize::from(self.peek() == Some(b'-'));
        let start = self.at;
        let whole = self.skip_digits()?;
        if whole > 1 && self.bytes[start] == b'0' {
            return Err(self.error("a number without leading zeros"));
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.skip_digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.skip_digits()?;
        }
        Ok(())
    }

    fn skip_digits(&mut self) -> Result<usize, HeaderError> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        match self.at - start {
            0 => Err(self.error("a digit")),
            digits => Ok(digits),
        }
    }
}
