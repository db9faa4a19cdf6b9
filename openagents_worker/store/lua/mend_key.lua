-- Puts a key of this library aside if its type is not `kind`, unless it is a key that must stay in place.
-- Returns MOVED | LEFT | SOUND
local A = aside()
local found = A.type_of(key)
if found == 'none' or found == kind then return 'SOUND' end
if A.is_left_in_place(key) then return 'LEFT' end
A.move(key)
return 'MOVED'
