"""Where the server is, and which key it wants, unless somebody says so."""

from qsharp_core.secret_files import secret

LOCAL = "http://localhost:8000"


def default_url() -> str:
    """`QSHARP_URL`, or a server on this machine."""
    return secret("QSHARP_URL") or LOCAL


def default_key() -> str | None:
    """`QSHARP_API_KEY`, or the variable that vLLM's server reads; each may be a file of secrets."""
    return secret("QSHARP_API_KEY") or secret("VLLM_API_KEY")
