"""The critics in the workers, seen from the API process.

`workers` calls them, `catalog` knows which are loaded, `roots` says where others may be loaded from.
"""
