"""Commands of `qsharp` that belong to the server: a module each, with `main(argv)`."""
