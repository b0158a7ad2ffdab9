"""Certificates: what was removed, from which weights, with what evidence; signed with a local Ed25519 key, and checked again.

A certificate holds hashes and numbers, and no text. Its rows stand as HMAC-SHA256 under the ledger's salt: who holds the ledger can
show that a row is among them, and who does not cannot guess a short text from its hash.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.durable import about, make_folder, settle, settle_names
from llm_unlearn.folder import sha256
from llm_unlearn.requests.records import canonical
from llm_unlearn.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY, PUBLIC = "requests.key", "public.pem"
SIGNATURE = "signature"
STORE = "store"
"""The place of weights that later deletions replace."""
FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*/adapter_*")
"""What a saved model or adapter is made of; of several adapters that are combined, each lies in a folder of its name."""

Certificate = dict[str, Any]
Hashes = Callable[[Path], dict[str, str]]
"""A folder -> file name -> SHA-256."""


def signing_key(folder: Path) -> Ed25519PrivateKey:
    """The key of this user, made on first use; readable by its owner only.

    Raises:
        Refused: the library is missing, or the file is no such key, or others may read it.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise Refused("certificates need cryptography; install it with: pip install 'llm-unlearn[requests]'.") from None
    path = folder / KEY
    if not path.exists():
        make_folder(folder)
        made = Ed25519PrivateKey.from_private_bytes(secrets.token_bytes(32)).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with about(path):
            _put_first(path, made)
    if path.stat().st_mode & 0o077:
        raise Refused(f"{path}: others may read this signing key; expected mode 0600. Change it with: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise Refused(f"{path}: not a signing key ({error}). Put the key back, or move the file away to have a new one.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise Refused(f"{path}: expected an Ed25519 key, found {type(key).__name__}.")
    return key


def _put_first(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, unless another process was first."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        settle(unfinished)
        os.link(unfinished, path)
    except FileExistsError:
        pass
    finally:
        unfinished.unlink(missing_ok=True)
    settle_names(path.parent)


def public_text(key: Ed25519PrivateKey) -> str:
    """The public half, 32 bytes in base64: what stands in a certificate."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def public_pem(key: Ed25519PrivateKey) -> str:
    """The public half as other programs read it."""
    from cryptography.hazmat.primitives import serialization

    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def read_public(path: Path) -> str:
    """A public key file as it stands in certificates.

    Raises:
        Refused: it is none.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(f"--key: {path}: no public key can be read there ({error}).") from None
    if not isinstance(key, Ed25519PublicKey):
        raise Refused(f"--key: {path}: expected an Ed25519 key, found {type(key).__name__}.")
    return base64.b64encode(key.public_bytes_raw()).decode()


def signed(content: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """A certificate as text: its content, the public key, and the signature over both in canonical form."""
    whole = {**content, "public_key": public_text(key)}
    signature = base64.b64encode(key.sign(canonical(whole).encode())).decode()
    return json.dumps({**whole, SIGNATURE: signature}, indent=1, allow_nan=False) + "\n"


def read(text: str, name: str) -> Certificate:
    """A certificate from its text.

    Raises:
        Refused: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not {"format", "request", "public_key", SIGNATURE} <= found.keys():
        raise Refused(f"{name}: not a certificate of this project.")
    return found


def signature_problems(certificate: Certificate, trusted: str | None) -> Iterable[str]:
    """What is wrong with a signature.

    Args:
        trusted: the public key that must have signed; None takes the one that the certificate names, which says only that
            nothing was changed since somebody signed.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    named = certificate["public_key"]
    if trusted is not None and named != trusted:
        yield f"signed with another key: {named}, expected {trusted}"
    content = {key: value for key, value in certificate.items() if key != SIGNATURE}
    try:
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(named))
        public.verify(base64.b64decode(certificate[SIGNATURE]), canonical(content).encode())
    except (InvalidSignature, ValueError, TypeError, RecursionError):
        yield "the signature does not fit: the certificate was changed after it was signed"


def weight_problems(certificate: Certificate, output: Path, hashes: Hashes) -> Iterable[str]:
    """Which of the weights it names are not, or not any more, as it says.

    Args:
        output: where the run folders are.
        hashes: what `files_of` finds in a folder.
    """
    weights = certificate["weights"]
    for part in (*weights["before"], weights["after"]):
        if part["place"] == STORE:  # is replaced by later deletions: verifying.py asks its manifest
            continue
        if part["place"] != "output" and not Path(part["name"]).is_dir():
            continue  # a hub's model is not looked up again
        folder = output / part["name"] if part["place"] == "output" else Path(part["name"])
        found = hashes(folder) if folder.is_dir() else {}
        if not found:
            yield f"weights {part['name']}: not there (looked in {folder})"
        for name in sorted({*found, *part["files"]}):
            if found and found.get(name) != part["files"].get(name):
                yield f"weights {part['name']}: {name} is not the file that was certified"


def files_of(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of the weights, settings and tokenizer in a folder."""
    found = {}
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        found[path.relative_to(folder).as_posix()] = sha256(path)
    return found
