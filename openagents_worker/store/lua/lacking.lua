-- Checks which of these commands the user may not run. Item n of `keys` is a key or channel for command n, or ''. Changes nothing.
-- Returns the positions of the refused commands, from 0.
--#include may
local lacking = {}
for i, command in ipairs(commands) do if not may(command, keys[i], by_trying == 1) then lacking[#lacking + 1] = i - 1 end end
return lacking
