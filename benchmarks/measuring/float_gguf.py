"""A GGUF file's weights as float32 in another GGUF file: what both sides of a comparison hold."""

from pathlib import Path

from gguf import GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import GGUFValueType, Keys
from gguf.quants import dequantize

# The writer counts and writes these by itself.
_ITS_OWN = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", Keys.General.ARCHITECTURE}


def write_float32(source: Path, target: Path) -> Path:
    """`target`: the tokenizer, settings and weights of `source`, dequantised as its reader does."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields[Keys.General.ARCHITECTURE].contents()))
    for name, field in reader.fields.items():
        if name in _ITS_OWN:
            continue
        value = field.contents()
        if name == Keys.General.FILE_TYPE:
            value = int(LlamaFileType.ALL_F32)
        kind = field.types[0]
        inner = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
