"""An SAE in other libraries' formats, and on the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastsae.formats import modules, pretrained

_CARD = """---
tags:
- sparse-autoencoder
- interpretability
---

# {name}

A sparse autoencoder in the format `{format}`: {about}.

```python
from fastsae import SAE

sae = SAE.from_pretrained("{repository}"{subfolder})
latents = sae.encode(x)  # x [.., {d_in}]
x_hat = sae.decode(latents{skip})
```
"""


class Published(nn.Module):
    """A module that can be written for others and uploaded."""

    d_in: int
    needs_x: bool

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        format: pretrained.Writable = "fastsae",  # noqa: A002
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes a folder that another library's loader reads; returns it. Normalisation is folded in.

        Args:
            folder: is made where it does not exist.
            format: "fastsae" is ``save``. "saelens": version 6; a BatchTopK becomes, as there, a JumpReLU at its running threshold.
                "sparsify": TopK only. "dictionary_learning": the class of that activation; where it has a fixed pre-bias that differs
                from this module's, ``b_dec`` moves into or out of the encoder's bias (the same scores up to rounding).
                "circuit_tracer": ``layer_0.safetensors``, to be renamed by its layer; ReLU, JumpReLU, BatchTopK at its running threshold.
            metadata: JSON values to write beside: SAELens's ``metadata`` (``model_name``, ``hook_name`` ..), else an entry of its own.

        Files of other formats hold what inference needs: loss options, silent counts and optimisers stay behind. What a format cannot say
        raises ValueError that names it.
        """
        own: Any = self
        return modules.save_pretrained(own, folder, format, metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        format: pretrained.Writable = "fastsae",  # noqa: A002
        subfolder: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        card: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a sparse autoencoder",
    ) -> str:
        """Uploads what ``save_pretrained`` writes, and a model card, to a repository, which is made where there is none. Needs
        huggingface_hub.

        Args:
            repo_id: ``"owner/name"``, or ``"name"`` of one's own. subfolder: path inside the repository, e.g. ``"layers.5.mlp"``.
            format, metadata: as in ``save_pretrained``.
            card: text of ``README.md``; None: one of the configuration and how to load it, unless the repository has a README already.
            private: whether a repository that is made is private; None: as the account's settings say.
            token: of the Hub; None: the one that is logged in.
            revision: branch to commit to; None: main.

        Returns: the address of the commit.

        Raises: ImportError: huggingface_hub is not installed. ValueError: as ``save_pretrained``, before anything is uploaded; a subfolder
        outside of the repository. What huggingface_hub raises where the Hub refuses.
        """
        op = "SAE.push_to_hub"
        if not isinstance(repo_id, str):  # pyright: ignore[reportUnnecessaryIsInstance] # callers may have no type checker
            raise TypeError(f"{op}: repo_id must be the name of a repository, got {type(repo_id).__name__}")
        pretrained.check_subfolder(op, subfolder)
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError(f"{op}: writing to the Hub needs huggingface_hub: pip install 'fastsae-kernels[hub]'") from error
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder / (subfolder or ""), format=format, metadata=metadata)
            api = HfApi(token=token)
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if card is not None or not api.file_exists(repository, "README.md", revision=revision):
                text = card or _CARD.format(
                    name=repository.rpartition("/")[2],
                    format=format,
                    about=self.extra_repr(),
                    repository=repository,
                    subfolder=f', subfolder="{subfolder}"' if subfolder else "",
                    d_in=self.d_in,
                    skip=", x" if self.needs_x else "",
                )
                (folder / "README.md").write_text(text, encoding="utf-8")
            done = api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=commit_message)
        return str(done.commit_url)
