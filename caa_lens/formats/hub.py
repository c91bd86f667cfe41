"""A repository of vectors on the Hugging Face hub, and the same as a local folder.

It holds `vectors.safetensors` in the package's own format, which loses nothing, and `README.md`, a model card made from it.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import HfApi

from caa_lens.files import atomic_path
from caa_lens.formats.base import Given
from caa_lens.hub import fetch
from caa_lens.storage import load_vectors, save_vectors
from caa_lens.vector_set import VectorSet

WEIGHTS, CARD = "vectors.safetensors", "README.md"


def load_hub(path: Path, given: Given) -> VectorSet:
    """Vectors of a local folder of that layout."""
    return given.checked(path, load_vectors(path / WEIGHTS))


def pull_from_hub(where: str, given: Given) -> VectorSet:
    """Vectors of the repository `OWNER/NAME[@REVISION]`; from the hub's cache if it is there.

    Raises:
        InputError: no name of a repository, or no vectors in it.
        MissingError: no such repository or file, or neither the hub nor a cached copy can be reached.
    """
    return given.checked(f"hub:{where}", load_vectors(fetch(where, WEIGHTS, kind="model")))


def save_hub(vectors: VectorSet, path: Path, *, repository: str = "OWNER/NAME") -> None:
    """Writes both files into a folder, each whole or not at all; other files in it stay.

    Args:
        repository: the name that the card gives for loading.
    """
    with ExitStack() as stack:
        save_vectors(vectors, stack.enter_context(atomic_path(path / WEIGHTS)))
        stack.enter_context(atomic_path(path / CARD)).write_text(model_card(vectors, repository), encoding="utf-8")


def push_to_hub(
    vectors: VectorSet, repository: str, *, private: bool = False, token: str | None = None, message: str | None = None
) -> str:
    """Uploads vectors and card to the repository `OWNER/NAME`, which is made if it does not exist.

    Args:
        vectors: what to upload, controls and provenance included.
        repository: its name.
        private: whether a new repository is private.
        token: of the hub; by default the one that `hf auth login` or HF_TOKEN set.
        message: of the commit.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_hub(vectors, Path(folder), repository=repository)
        return str(
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message or f"Vectors: {vectors.provenance.expression}",
            )
        )


def model_card(vectors: VectorSet, repository: str) -> str:
    """The card: what the vectors are, how they were made, how they are used, and what they do not show."""
    made = vectors.provenance
    front = {
        "library_name": "caa_lens",
        "tags": ["steering-vectors", "contrastive-activation-addition", "transformer-lens"],
        **({"base_model": made.model} if "/" in made.model else {}),
    }
    facts = {
        "model": made.model + (f", revision {made.revision}" if made.revision else ""),
        "site": f"resid_post (output of a block), layers 0-based, {made.n_layers} in the model; {made.basis} weights",
        "d_model": str(made.d_model),
        "contrast pairs": f"{made.n_pairs}, hash {made.pairs_hash}" if made.n_pairs else "not recorded",
        "template": made.template or "not recorded",
        "token read": made.read or "not recorded",
        "normalised across": ", ".join(made.normalized_across) or "nothing: norms as extracted",
        "controls": ", ".join(vectors.controls) or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(made.versions.items())) or "not recorded",
    }
    norms = "\n".join(
        f"| {v.layer} | {v.norm:.4g} | {'' if v.relative_norm is None else f'{v.relative_norm:.3f}'} |"
        for v in vectors.values()
    )
    middle = vectors.layers[len(vectors) // 2]
    # JSON is YAML, and escapes what a name may hold.
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"""---
{header}
---

# Steering vectors: {_plain(made.expression)}

Contrastive activation addition: the mean difference of a model's activations on contrasting texts. Adding a vector to the residual
stream pushes the model's text towards the positive side, subtracting it towards the negative.

```python
import caa_lens as caa

vectors = caa.load_vectors("hub:{repository}")  # or the path of this folder
model = caa.load_model({json.dumps(made.model)})
with caa.steer(model, vectors[{middle}]):
    print(caa.generate(model, "How was your weekend?"))
```

| | |
|---|---|
{chr(10).join(f"| {key} | {_plain(value)} |" for key, value in facts.items())}

| layer | norm | norm / norm of the residual stream |
|---|---|---|
{norms}

Usable strengths give 0.1 to 0.4 in the last column; far beyond, the text falls apart. A vector also carries whatever else differs
between the two sides of its pairs. Measure it on prompts that it was not made from, beside its controls (`caa.sweep`), before
relying on it.
"""


def _plain(text: str) -> str:
    """`text` in one line of a table, not as markup."""
    return " ".join(text.split()).translate({ord(mark): f"\\{mark}" for mark in "|`*_<>[]#"})
