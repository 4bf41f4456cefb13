"""Nothing secret leaves the machine: passwords and tokens in text are replaced by *** before they are logged or sent."""

import os
import re
from collections.abc import Mapping
from typing import Any

STARS = "***"
SECRET_NAME = (
    r"(?:passw(?:or)?d|passphrase|pwd|secret|credentials?|(?:api|auth|private|account)[_-]?key"
    r"|access[_-]?key(?:[_-]?id)?|(?-i:[A-Z0-9]_KEY)|token)"
)
"""The last word of the name of a secret. "tokens", which are counted, is none, and a key is one where it is a variable's."""
URL_USER = re.compile(r"(?<=://)(?:[^/\s@'\"]*:[^\s'\"]+|[^/\s'\"]+)(?=@)")
"""Passwords with a / or @ in them, too."""
URL_PARAMETER = re.compile(
    rf"(?<=[?&])((?:[\w.-]*{SECRET_NAME}|(?:[\w.-]+[_-])?(?:sig|signature))=)[^&\s'\"]+", re.IGNORECASE
)
ASSIGNED = re.compile(
    rf"(\b[\w.-]*{SECRET_NAME}['\"]?\s*[=:]\s*)(?:'[^'\n]+'|\"[^\"\n]+\"|(?:(?:bearer|basic)[ \t]+)?[^\s'\",;&]+)",
    re.IGNORECASE,
)
OPTION = re.compile(rf"((?<!\S)--?[\w-]*{SECRET_NAME}[ \t]+)(?:'[^'\n]+'|\"[^\"\n]+\"|[^-\s'\"]\S*)", re.IGNORECASE)
PRIVATE_KEY = re.compile(
    r"(-----BEGIN ([A-Z ]*)PRIVATE KEY[A-Z ]*-----).*?(?:(?=-----END \2PRIVATE KEY)|\Z)", re.DOTALL
)
"""A file that holds one; to the end of the text where it is cut."""
EMPTY = re.compile(r"^['\"]?(?:null|none|true|false|\*\*\*|)['\"]?$", re.IGNORECASE)
BEARER = re.compile(r"(\b(?:bearer|basic)\s+)[A-Za-z0-9+/._~=-]{8,}", re.IGNORECASE)
KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|dapi[a-f0-9]{32}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
"""Tokens that say themselves what they are: Hugging Face, GitHub, GitLab, OpenAI, Slack, AWS, Databricks, JSON web tokens."""
SHORTEST = 6
"""Values of variables that are shorter stand in too many other words."""


def mask(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with *** for credentials in URLs, values of keys like password or token, tokens of known form, and
    the values of all environment variables with such names (default: this process's)."""
    for value in secret_values(os.environ if environment is None else environment):
        text = text.replace(value, STARS)
    text = PRIVATE_KEY.sub(rf"\1{STARS}", text)
    text = URL_USER.sub(STARS, text)
    text = URL_PARAMETER.sub(rf"\1{STARS}", text)
    text = ASSIGNED.sub(_hide, text)
    text = OPTION.sub(rf"\1{STARS}", text)
    text = BEARER.sub(rf"\1{STARS}", text)
    return KNOWN.sub(STARS, text)


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Longest first: one may contain another."""
    named = re.compile(rf"{SECRET_NAME}$", re.IGNORECASE)
    found = {value for name, value in environment.items() if named.search(name) and name not in ("PWD", "OLDPWD")}
    found = {value for value in found if len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def without_credentials(uri: str) -> str:
    """Which store it is, without what opens it: `scheme://host/path`."""
    if uri.startswith("sqlite"):
        return uri  # a path
    return re.sub(r"[?&][^=&]*=\*{3}", "", mask(uri, {}).replace(f"{STARS}@", ""))


def masked(values: Any, name: str = "") -> Any:
    """Nested settings with every secret replaced: by what its key is called, or by what it looks like."""
    if isinstance(values, Mapping):
        return {key: masked(value, str(key)) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [masked(value, name) for value in values]
    if not isinstance(values, str) or EMPTY.match(values):
        return values
    return STARS if re.search(rf"{SECRET_NAME}$", name, re.IGNORECASE) else mask(values)


def _hide(match: re.Match[str]) -> str:
    value = match[0][len(match[1]) :]
    return match[0] if EMPTY.match(value) else match[1] + STARS
