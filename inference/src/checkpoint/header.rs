//! The header of a safetensors file, read with every number distrusted.
//!
//! Beside the `safetensors` crate's reader, which stops at the first fault, this one names every faulty tensor.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

use protocol::Precision;
use protocol::plain_text::plain_line;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

/// Longest header that is read, in bytes. The largest published shards have some 2 MB.
pub const HEADER_BYTES_MAX: u64 = 16 << 20;
/// Longest name of a tensor, in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest description of a tensor, in bytes, and most sides of its shape.
const ENTRY_BYTES_MAX: usize = 1024;
const SIDES_MAX: usize = 8;
/// Problems of one file that are told apart.
const PROBLEMS_MAX: usize = 1000;

/// A tensor as the header describes it, with its bytes' place in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorEntry {
    /// The number format; nothing for one that no weight of ours may have.
    pub precision: Option<Precision>,
    /// The number format as written.
    pub dtype: String,
    /// Outermost first.
    pub shape: Vec<u64>,
    /// Where its bytes stand in the file.
    pub range: Range<u64>,
}

/// What is wrong with a file or with one of its tensors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeaderProblem {
    /// Which tensor, if it is one tensor's fault.
    pub tensor: Option<String>,
    /// What is wrong.
    pub what: String,
}

/// Returns the tensors of a file of which `file` are the bytes, or everything that is wrong with it.
pub fn read_header(file: &[u8]) -> Result<BTreeMap<String, TensorEntry>, Vec<HeaderProblem>> {
    let whole = |what: String| vec![HeaderProblem { tensor: None, what }];
    let file_bytes = file.len() as u64;
    let length = file.first_chunk::<8>().ok_or_else(|| whole(format!("has {file_bytes} bytes, too few for a header")))?;
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(whole(format!("claims a header of {length} bytes, the limit is {HEADER_BYTES_MAX}")));
    }
    let data_start = 8 + length;
    if data_start > file_bytes {
        return Err(whole(format!("claims a header of {length} bytes, the file has {file_bytes}")));
    }
    let json = &file[8..data_start as usize];
    if json.first() != Some(&b'{') {
        return Err(whole("header does not start with {".into()));
    }
    let UniqueKeys(fields) = serde_json::from_slice(json).map_err(|error| whole(format!("header is not valid JSON: {error}")))?;
    let mut tensors = BTreeMap::new();
    let mut problems = Vec::new();
    for (name, text) in fields {
        if problems.len() >= PROBLEMS_MAX {
            problems.extend(whole(format!("has more than {PROBLEMS_MAX} faulty tensors")));
            return Err(problems);
        }
        if name == "__metadata__" {
            if serde_json::from_str::<HashMap<Cow<'_, str>, Cow<'_, str>>>(text.get()).is_err() {
                problems.extend(whole("__metadata__ is not a map of texts".into()));
            }
            continue;
        }
        if name.len() > NAME_BYTES_MAX {
            problems.extend(whole(format!("names a tensor in {} bytes, the limit is {NAME_BYTES_MAX}", name.len())));
            continue;
        }
        match described(text.get()).and_then(|value| entry(&value, data_start, file_bytes)) {
            Ok(entry) => drop(tensors.insert(name, entry)),
            Err(what) => problems.push(HeaderProblem { tensor: Some(name), what }),
        }
    }
    problems.extend(misplaced(&tensors, data_start));
    if problems.is_empty() {
        let end = tensors.values().map(|tensor| tensor.range.end).max().unwrap_or(data_start);
        if end != file_bytes {
            problems.extend(whole(format!("has {} bytes after the last tensor", file_bytes - end)));
        }
    }
    if problems.is_empty() { Ok(tensors) } else { Err(problems) }
}

/// A tensor's description, if it is no longer than any that makes sense.
fn described(text: &str) -> Result<Value, String> {
    if text.len() > ENTRY_BYTES_MAX {
        return Err(format!("is described in {} bytes, the limit is {ENTRY_BYTES_MAX}", text.len()));
    }
    serde_json::from_str(text).map_err(|error| format!("is not described in JSON: {error}"))
}

/// Reads one tensor's description; every size product is checked.
fn entry(value: &Value, data_start: u64, file_bytes: u64) -> Result<TensorEntry, String> {
    let field = |name: &str| value.get(name).ok_or_else(|| format!("has no {name}"));
    if let Some(unknown) =
        value.as_object().ok_or("is not an object")?.keys().find(|key| !["dtype", "shape", "data_offsets"].contains(&key.as_str()))
    {
        return Err(format!("has an unknown field {:?}", plain_line(unknown)));
    }
    let dtype = field("dtype")?.as_str().ok_or("dtype is not a text")?.to_owned();
    let numbers = |name: &str| -> Result<Vec<u64>, String> {
        let list = field(name)?.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
        list.ok_or_else(|| format!("{name} is not a list of whole numbers"))
    };
    let shape = numbers("shape")?;
    if shape.len() > SIDES_MAX {
        return Err(format!("has a shape of {} sides, the limit is {SIDES_MAX}", shape.len()));
    }
    let offsets = <[u64; 2]>::try_from(numbers("data_offsets")?).map_err(|_| "data_offsets are not two numbers")?;
    let bits = dtype_bits(&dtype).ok_or_else(|| format!("has unknown dtype {:?}", plain_line(&dtype)))?;
    let size = shape.iter().try_fold(bits, |product, &side| product.checked_mul(side));
    let size = size.filter(|bits| bits % 8 == 0).ok_or_else(|| format!("shape {shape:?} has an impossible size"))? / 8;
    let [start, end] = offsets;
    if start.checked_add(size) != Some(end) {
        return Err(format!("data_offsets {start}..{end} do not hold shape {shape:?} of {dtype}, which takes {size} bytes"));
    }
    let file_end = data_start.checked_add(end).filter(|&end| end <= file_bytes);
    let file_end =
        file_end.ok_or_else(|| format!("lies at {start}..{end}, the file has only {} bytes of data", file_bytes - data_start))?;
    let range = file_end - size..file_end;
    let precision = match dtype.as_str() {
        "F32" => Some(Precision::F32),
        "F16" => Some(Precision::F16),
        "BF16" => Some(Precision::Bf16),
        _ => None,
    };
    Ok(TensorEntry { precision, dtype, shape, range })
}

/// Finds tensors that overlap the one before them or leave a hole after it.
fn misplaced(tensors: &BTreeMap<String, TensorEntry>, data_start: u64) -> Vec<HeaderProblem> {
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
    let mut problems = Vec::new();
    let mut end = data_start;
    let mut before = "the header";
    for (name, tensor) in by_place {
        let problem = |what: String| HeaderProblem { tensor: Some(name.clone()), what };
        if tensor.range.start < end {
            problems.push(problem(format!("overlaps {before} by {} bytes", end.min(tensor.range.end) - tensor.range.start)));
        } else if tensor.range.start > end {
            problems.push(problem(format!("leaves a hole of {} bytes after {before}", tensor.range.start - end)));
        }
        if tensor.range.end >= end {
            (end, before) = (tensor.range.end, name);
        }
    }
    problems
}

fn dtype_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// A JSON object that names nothing twice: which of two tensors would be meant?
struct UniqueKeys<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for UniqueKeys<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = UniqueKeys<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueKeys<'de>, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut fields = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, &RawValue>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("{} stands twice", plain_line(&key))));
                    }
                    fields.push((key, value));
                }
                Ok(UniqueKeys(fields))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
