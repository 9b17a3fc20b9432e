"""Text to token ids and back: SentencePiece, and byte-level BPE (byte-pair encoding).

Llama 2 and our miniature come with a SentencePiece .model file; Llama 3.2, Qwen2.5 and SmolLM2 with
a tokenizer.json of BPE. A tokenizer also knows the format in which its LLM (large language model)
was taught to chat. Try:

    python -c "from lib.tokenizers import *; print(train_tokenizer(['a drum.'], 300).encode('a'))"
"""
import functools
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from lib.weights import as_value_error, read_json


class SentencePieceTokenizer:
    """Text to ids and back, exactly: unknown characters become bytes, white space is kept.

    serialized: the bytes of a SentencePiece .model file. eos_ids: what ends an answer beside its
    own eos_id; a checkpoint does not keep them, as its LLM was trained to end with eos_id.
    """

    def __init__(self, serialized, eos_ids=()):
        from sentencepiece import SentencePieceProcessor
        self.serialized = serialized
        self.processor = SentencePieceProcessor(model_proto=serialized)
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("it has no tokens for the beginning and the end of a text")
        self.eos_ids = [self.eos_id, *eos_ids]
        self.vocab_size = len(self.processor)
        # an LLM whose vocabulary has no bracket, like our miniature, never read Llama 2's [INST]
        self.llama2_chat = not self.processor.is_unknown(self.processor.piece_to_id("["))

    def encode(self, text):
        return self.processor.encode(text)

    def decode(self, ids):
        return self.processor.decode(list(ids))

    def chat(self, question, system="", continuing=False):
        """As BPETokenizer.chat, in the format of Llama 2 or, without its brackets, our miniature's;
        in both the system prompt stands with the question."""
        question = question.strip()
        if not self.llama2_chat:
            before = [self.eos_id if continuing else self.bos_id]
            return before, self.encode(f"{system} {question}".strip() + "\n")
        before = [self.eos_id, self.bos_id] if continuing else [self.bos_id]
        system = f"<<SYS>>\n{system.strip()}\n<</SYS>>\n\n" if system else ""
        return before, self.encode(f"[INST] {system}{question} [/INST]")

    def reply(self, answer):
        """As BPETokenizer.reply."""
        space = "" if self.llama2_chat else " "
        return self.encode(space + answer.strip()) + [self.eos_id]


def train_tokenizer(texts, vocab_size):
    """A SentencePieceTokenizer (BPE, unknown characters as bytes) learnt from an iterable of
    strings. It has at most vocab_size tokens, fewer if the texts are too few."""
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return SentencePieceTokenizer(model.getvalue())


# --------------------------------------------------------------------------- text to pieces of text

# The patterns by which GPT-2 (and SmolLM2), Llama 3 and Qwen2 split text before BPE: words with the
# space before them, numbers, punctuation, white space.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")


@functools.cache
def char_class(category):
    """The inside of a `re` set: letters (L), numbers (N) or Unicode's white space (s)."""
    def belongs(code):
        if category == "s":
            return chr(code).isspace() and not 28 <= code <= 31  # white space to Python only
        return unicodedata.category(chr(code))[0] == category

    members = [belongs(code) for code in range(0x40000)]  # there are none in the planes above
    edges = [code for code in range(len(members)) if members[code] != members[code - 1]]
    runs = zip(edges[::2], edges[1::2])
    return "".join(f"\\U{start:08x}-\\U{end - 1:08x}" for start, end in runs)


@functools.cache
def compile_pattern(pattern):
    r"""Compile a pattern with \p{L}, \p{N} and Unicode's \s, none of which Python's `re` has.

    Each becomes a set of characters: [^\s\p{L}] is filled in, and \p{L} outside a set becomes one.
    """
    parts = re.split(r"(\[.*?\])", pattern.replace(r"\S", r"[^\s]"))  # every second one is a set
    parts[::2] = [re.sub(r"\\p\{.\}|\\s", r"[\g<0>]", part) for part in parts[::2]]
    return re.compile(re.sub(r"\\p\{(.)\}|\\s", lambda match: char_class(match[1] or "s"),
                             "".join(parts)))


def pretokenizer_patterns(step):
    """The patterns by which a tokenizer.json's pre-tokenizer splits text, one after another.

    ValueError for a pre-tokenizer that would be computed wrongly.
    """
    kind = step["type"]
    if kind == "Sequence" and step["pretokenizers"][-1]["type"] == "ByteLevel":
        return [p for part in step["pretokenizers"] for p in pretokenizer_patterns(part)]
    if kind == "Digits" and step["individual_digits"]:
        return [r"\p{N}|[^\p{N}]+"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2_PATTERN] if step.get("use_regex", True) else []
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        if step["pattern"].get("Regex") in (LLAMA3_PATTERN, QWEN2_PATTERN):
            return [step["pattern"]["Regex"]]
    raise ValueError(f"its pre-tokenizer has {json.dumps(step)}, which is not known here")


# GPT-2 writes every byte as a visible character: a printable one as itself, others from U+0100 on.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_ENCODER = {byte: chr(byte) for byte in PRINTABLE_BYTES}
BYTE_ENCODER |= {byte: chr(256 + i) for i, byte in enumerate(OTHER_BYTES)}
BYTE_DECODER = {ord(char): byte for byte, char in BYTE_ENCODER.items()}


def to_byte_chars(text):
    """A text's UTF-8 bytes, each as the character that stands for it."""
    return text.encode().decode("latin-1").translate(BYTE_ENCODER)


# ------------------------------------------------------------------------------------ pieces to ids

class ChatFormat(NamedTuple):
    """The special tokens and white space around what is said in a chat."""
    start: str  # of the whole chat
    turn: str   # opens a turn of the role {}: system, user or assistant
    end: str    # closes a turn

    @property
    def marks(self):
        """Its special tokens."""
        return set(re.findall(r"<\|.*?\|>", "".join(self)))


CHAT_FORMATS = (  # of Llama 3, and of Qwen2.5 and SmolLM2
    ChatFormat("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    ChatFormat("", "<|im_start|>{}\n", "<|im_end|>\n"))


class BPETokenizer:
    """Byte-level BPE: text is split into pieces, a piece is its UTF-8 bytes, and neighbours are
    merged in the order in which the merges were learnt.

    spec: the content of a tokenizer.json, with "eos_ids": what ends an answer beside the token that
    closes a turn of its chat. ValueError for a tokenizer that would be computed wrongly.
    """

    def __init__(self, spec):
        check_model(spec)
        self.spec = spec
        self.normal_form = "NFC" if spec.get("normalizer") else None
        self.patterns = [compile_pattern(p) for p in pretokenizer_patterns(spec["pre_tokenizer"])]
        self.read_added_tokens(spec.get("added_tokens") or [])
        # a special token is no piece of text, even where the vocabulary lists it among the others
        self.vocab = {token: i for token, i in spec["model"]["vocab"].items()
                      if token not in self.special_tokens}
        self.tokens = {i: token for token, i in self.vocab.items()}  # id -> its byte characters
        self.tokens |= {i: to_byte_chars(text) for text, i in self.added_tokens.items()
                        if text not in self.special_tokens}
        ids = [*self.added_tokens.values(), *self.vocab.values()]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError("its ids are not all whole numbers of 0 or more")
        self.vocab_size = 1 + max(ids)

        merges = (merge.split(" ") if isinstance(merge, str) else merge  # as older files write it
                  for merge in spec["model"]["merges"])
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        missing = {a + b for a, b in self.ranks} - self.vocab.keys()
        if missing:
            raise ValueError(f"its vocabulary lacks {len(missing)} tokens, like {min(missing)!r}")
        self.ignore_merges = spec["model"].get("ignore_merges", False)
        self.merge = functools.lru_cache(1 << 16)(self.merge)  # the same words come again and again
        self.bos_id = spec.get("bos_id")
        listed = spec.get("eos_ids", [spec.get("eos_id")])  # older checkpoints have but one
        closing = [self.added_tokens[self.chat_format.end.strip()]] if self.chat_format else []
        self.eos_ids = closing + [i for i in listed if i is not None]
        self.eos_id = self.eos_ids[0] if self.eos_ids else None

    def read_added_tokens(self, added):
        """Which tokens are found in a text before it is split, which of them are special, and the
        chat format that they make possible."""
        self.added_tokens = {token["content"]: token["id"] for token in added}
        formats = [f for f in CHAT_FORMATS if f.marks <= self.added_tokens.keys()]
        self.chat_format = formats[0] if formats else None
        marks = set().union(*(f.marks for f in formats))
        # a chat's marks are special even if the file does not say so: no text may forge them
        self.special_tokens = {t["content"] for t in added if t["special"]} | marks
        self.special_ids = {self.added_tokens[content] for content in self.special_tokens}
        self.added_patterns = []
        for normalized in (False, True):  # looked for in the raw text, then in the normalized
            own = [t for t in added if t.get("normalized", not t["special"]) == normalized]
            ids = {self.normalize(t["content"]) if normalized else t["content"]: t["id"]
                   for t in own}
            either = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))  # longest first
            self.added_patterns.append((ids, re.compile(either or "(?!)")))  # (?!) is never found
        for token in added:
            if token["content"] in marks or not token["special"]:
                for key in ("single_word", "lstrip", "rstrip"):
                    if token.get(key):
                        raise ValueError(f"{key} of {token['content']!r} is not known here")

    def __reduce__(self):  # the cache of `merge` cannot be pickled, as worker processes need it
        return tokenizer_from_bytes, (self.serialized,)

    @property
    def serialized(self):
        """Bytes from which tokenizer_from_bytes makes this tokenizer again."""
        return json.dumps(self.spec).encode()

    def normalize(self, text):
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def split_added(self, text, special):
        """The ids of added tokens in a text, and the normalized strings between them, in order."""
        parts = [text]
        for normalized, (ids, pattern) in enumerate(self.added_patterns):
            parts, longer = [], parts
            for part in longer:
                if isinstance(part, int):
                    parts.append(part)
                    continue
                part, start = self.normalize(part) if normalized else part, 0
                for match in pattern.finditer(part):
                    if special or ids[match[0]] not in self.special_ids:
                        parts += [part[start:match.start()], ids[match[0]]]
                        start = match.end()
                parts.append(part[start:])
        return parts

    def encode(self, text, special=False):
        """Ids of a text. What is spelt like an added token becomes that token; like a special one,
        only if `special`."""
        ids = []
        for part in self.split_added(text, special):
            if isinstance(part, int):
                ids.append(part)
                continue
            pieces = [part]
            for pattern in self.patterns:
                pieces = [piece for longer in pieces for piece in pattern.findall(longer)]
            for piece in pieces:
                ids += self.merge(to_byte_chars(piece))
        return ids

    def merge(self, piece):
        """Ids of a piece in byte characters: merge the pair learnt first, as long as one is known.

        A pair is merged wherever it stands, from left to right. For example "lower" with the merges
        (l, o), (e, r), (lo, w): lo w e r, lo w er, low er. With ignore_merges a piece that is a
        token is that token.
        """
        if self.ignore_merges and piece in self.vocab:
            return [self.vocab[piece]]
        last = len(self.ranks)
        parts = [char for char in piece if char in self.vocab]  # SmolLM2 lacks a few bytes
        while len(parts) > 1:
            a, b = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, last))
            if (a, b) not in self.ranks:
                break
            spaced = "".join(f" {part} " for part in parts)  # no byte character is a space
            parts = spaced.replace(f" {a}  {b} ", f" {a}{b} ").split()
        return [self.vocab[part] for part in parts]

    def decode(self, ids):
        """The text of ids, without special tokens; what is not UTF-8 becomes U+FFFD."""
        byte_chars = "".join(self.tokens.get(i, "") for i in ids)
        return byte_chars.translate(BYTE_DECODER).encode("latin-1").decode("utf-8", "replace")

    def chat(self, question, system="", continuing=False):
        """Ids of a chat that asks a question, in two parts: what comes before the question (and
        before the audio that it is about); the question, and what makes the model answer.

        system: the system prompt. continuing: the first part closes the answer that it follows,
        instead of starting a chat. ValueError if the chat format is unknown.
        """
        if not self.chat_format:
            raise ValueError("this tokenizer has the special tokens of no chat known here, which "
                             "are Llama 3's and Qwen2's: use an LLM that was trained to chat")
        start, turn, end = self.chat_format
        encode_format = functools.partial(self.encode, special=True)  # never for a user's words
        before = encode_format(end if continuing else start)
        if system:
            before += encode_format(turn.format("system"))
            before += self.encode(system.strip()) + encode_format(end)
        before += encode_format(turn.format("user"))
        after = self.encode(question.strip()) + encode_format(end + turn.format("assistant"))
        return before, after

    def reply(self, answer):
        """Ids of an answer, as it follows the second part of a chat, and of its end."""
        return self.encode(answer.strip()) + [self.eos_id]


def check_model(spec):
    """ValueError if a tokenizer.json's model or normalizer would be computed wrongly here."""
    normalizer = spec.get("normalizer")
    if spec["model"]["type"] != "BPE" or normalizer and normalizer["type"] != "NFC":
        raise ValueError("only BPE is known here, with Unicode's normalizer NFC or none")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if spec["model"].get(key):
            raise ValueError(f"its {key} {spec['model'][key]!r} is not known here")


# -------------------------------------------------------------------------------------------- files

def tokenizer_from_bytes(data):
    """The tokenizer whose `serialized` this is: bytes of a SentencePiece .model, or of JSON."""
    if data[:1] == b"{":
        return BPETokenizer(json.loads(data))
    return SentencePieceTokenizer(data)


def find_tokenizer(folder):
    """The file of a folder's tokenizer. Llama 3's tokenizer.model is not SentencePiece's but that
    of tiktoken, lines of base64 and a number; its tokenizer.json has the same tokens."""
    model = folder / "tokenizer.model"
    with as_value_error(model, "tokenizer"):
        if model.exists():
            with open(model, "rb") as file:
                if not re.match(rb"\S+ \d+\s", file.read(200)):
                    return model
    return folder / "tokenizer.json"


def read_eos_ids(folder):
    """The ids that end an answer, as config.json and generation_config.json list them: one each,
    several, or none."""
    ids = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        listed = read_json(path).get("eos_token_id") if path.exists() else None
        ids += listed if isinstance(listed, list) else [listed]
    return [i for i in ids if i is not None]


def load_tokenizer(path):
    """The tokenizer in a .model file, a tokenizer.json, or a folder with one of them.

    A config.json and a generation_config.json beside it say which ids end an answer. ValueError,
    one line, for a tokenizer that cannot be used, or has more tokens than the config's LLM.
    """
    path = Path(path)
    path = find_tokenizer(path) if path.is_dir() else path
    config_path = path.with_name("config.json")
    config = read_json(config_path) if config_path.exists() else {}
    spec = read_json(path) if path.suffix == ".json" else None
    eos_ids = read_eos_ids(path.parent)
    with as_value_error(path, "usable tokenizer"):
        if spec is None:
            tokenizer = SentencePieceTokenizer(path.read_bytes(), eos_ids)
        else:
            spec |= {"bos_id": config.get("bos_token_id"), "eos_ids": eos_ids}
            tokenizer = BPETokenizer(spec)
        vocab_size = config.get("vocab_size", tokenizer.vocab_size)
        if type(vocab_size) is not int or tokenizer.vocab_size > vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens, and {config_path} says "
                             f"{vocab_size!r}: they do not belong together")
        for i in eos_ids:
            if type(i) is not int or i not in range(vocab_size):
                raise ValueError(f"{i!r}, an eos_token_id in config.json or generation_config.json "
                                 f"beside it, is none of its {vocab_size} ids")
    return tokenizer
