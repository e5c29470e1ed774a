"""The server's commands of `qsharp`: one module each, with `main(argv)`."""
