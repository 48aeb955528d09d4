"""The browser side of vfmlab: one file per tab, all computation in the library."""
