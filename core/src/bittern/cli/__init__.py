"""The command line ``bittern``: one file per command, imported when it is called."""
