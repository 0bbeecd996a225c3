"""Rows, chats and padded batches."""
