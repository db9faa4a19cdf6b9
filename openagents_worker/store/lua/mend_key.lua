-- Puts a key of this library aside that has another type than it must have (`kind`), unless nothing can go on without it.
-- Returns MOVED | LEFT | SOUND
local A = aside()
local found = A.type_of(key)
if found == 'none' or found == kind then return 'SOUND' end
if A.is_left_in_place(key) then return 'LEFT' end
A.move(key)
return 'MOVED'
