"""Every interleaving of saves, deletes and collections, walked over the decisions that the library really makes."""
