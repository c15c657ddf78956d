"""Ops on tokens as a value: matching and merging. (Rows are added by the token merging rules' helper.)"""
