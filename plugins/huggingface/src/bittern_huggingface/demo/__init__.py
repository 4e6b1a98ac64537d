"""The demo model that ships with the plugin, and ``bittern demo``."""
