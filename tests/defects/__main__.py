"""Prints the table of the original SDK's defects."""

from tests.defects.table import defects, rows

for line in rows():
    print(line)
found = defects()
tested, prevented = sum(bool(each.tests) for each in found), sum(bool(each.prevented) for each in found)
print(f"\n{len(found)} defects: {tested} with tests, {prevented} cannot occur")
