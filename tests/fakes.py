"""Small real parts, built in memory: tokenizers of every family, trained on a few sentences."""

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "This sentence means in one word: embedding, which is a list of numbers.",
    "Query: how do I get funding for my web based startup idea?",
    "In 2024 there were 1,234 reports of 56 different kinds; 78% were read.",
    "Naïve café owners in Zürich said: “déjà vu”, don't you think?",
    "日本語の文章もここにあります。北京是中国的首都。",
    "Это предложение написано по-русски, чтобы буквы были знакомы.",
    "Represent this sentence for searching relevant passages:\n\tit's fine.",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "def encode(texts): return [len(text) for text in texts]  # code",
) * 3

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def tiny_tokenizer(family: str) -> Tokenizer:
    """A fresh tokenizer of that family; equal at every call.

    gpt2: byte-level BPE, nothing added. qwen: NFC, own split, <|im_start|> and the like, nothing
    added. llama3: BOS <|begin_of_text|>, ignore_merges. llama: SentencePiece BPE with byte
    fallback, blank prepended by the normalizer, BOS <s>. mistral: the same by Metaspace, first
    only. bert: WordPiece, lower case, [CLS] and [SEP]. xlmr: Unigram, <s> and </s>. t5: the same
    without <s>. opt: gpt2's with </s> put first.
    """
    return Tokenizer.from_str(_trained(family))


@cache
def _trained(family: str) -> str:
    return _FAMILIES[family]().to_str()


def _byte_level(
    pattern: str | None, specials: list[str], *, nfc: bool = False, ignore_merges: bool = False
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pattern is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _gpt2() -> Tokenizer:
    return _byte_level(None, ["<|endoftext|>"])


def _opt() -> Tokenizer:
    tokenizer = _byte_level(None, ["</s>"])
    tokenizer.post_processor = _around(tokenizer, before=["</s>"])
    return tokenizer


def _qwen() -> Tokenizer:
    return _byte_level(_QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)


def _llama3() -> Tokenizer:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(_LLAMA3, specials, ignore_merges=True)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            _around(tokenizer, before=["<|begin_of_text|>"]),
        ]
    )
    return tokenizer


def _sentencepiece_bpe() -> Tokenizer:
    """SentencePiece's BPE as converters write it: bytes in the vocabulary, merges over words."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=560, show_progress=False, special_tokens=specials)
    latin = [sentence for sentence in SENTENCES if max(sentence) < "\u3000"]
    tokenizer.train_from_iterator(latin, trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    document["model"].update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    document["added_tokens"] = document["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.post_processor = _around(tokenizer, before=["<s>"])
    return tokenizer


def _llama() -> Tokenizer:
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    document = json.loads(tokenizer.to_str())
    document["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _mistral() -> Tokenizer:
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _bert() -> Tokenizer:
    """WordPiece over letters, pieces and words; set, as its trainer is not repeatable."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word for sentence in SENTENCES for word in re.findall(r"\w+|\S", sentence.lower())}
    letters = sorted({letter for word in words for letter in word})
    pieces = [*letters, *sorted(words.difference(letters)), "embed", "sent"]
    pieces += [f"##{piece}" for piece in [*letters, "ding", "ed", "ence", "s"] if piece.isalnum()]
    vocabulary = dict.fromkeys([*specials, *pieces])
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = _around(tokenizer, before=["[CLS]"], after=["[SEP]"])
    return tokenizer


def _xlmr() -> Tokenizer:
    """Unigram over characters and whole words; its scores are set, not trained."""
    words = {word for sentence in SENTENCES for word in sentence.split()}
    letters = {letter for sentence in SENTENCES for letter in sentence} - {" ", "\n", "\t"}
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -8.0) for word in sorted(words)]
    pieces += [(letter, -6.0) for letter in sorted(letters - {"▁"})]
    pieces.append(("<mask>", 0.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = _around(tokenizer, before=["<s>"], after=["</s>"])
    return tokenizer


def _t5() -> Tokenizer:
    tokenizer = _xlmr()
    tokenizer.post_processor = _around(tokenizer, before=[], after=["</s>"])
    return tokenizer


def _around(
    tokenizer: Tokenizer, *, before: Iterable[str], after: Iterable[str] = ()
) -> processors.TemplateProcessing:
    before, after = list(before), list(after)
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in [*before, *after]],
    )


_FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": _gpt2,
    "qwen": _qwen,
    "llama3": _llama3,
    "llama": _llama,
    "mistral": _mistral,
    "bert": _bert,
    "xlmr": _xlmr,
    "t5": _t5,
    "opt": _opt,
}
# What holds for XLM-R's holds for T5's, which has one token less; so for GPT-2's and OPT's.
FAMILIES = tuple(family for family in _FAMILIES if family not in ("t5", "opt"))

# A special token of each family that stands alone in templates and could be typed by anyone.
LITERALS = {
    "gpt2": "<|endoftext|>",
    "qwen": "<|im_start|>",
    "llama3": "<|eot_id|>",
    "llama": "<s>",
    "mistral": "</s>",
    "bert": "[SEP]",
    "xlmr": "<s>",
    "t5": "</s>",
    "opt": "</s>",
}
EOS = {
    "gpt2": "<|endoftext|>",
    "qwen": "<|endoftext|>",
    "llama3": "<|end_of_text|>",
    "llama": "</s>",
    "mistral": "</s>",
    "bert": "[SEP]",
    "xlmr": "</s>",
    "opt": "</s>",
}
