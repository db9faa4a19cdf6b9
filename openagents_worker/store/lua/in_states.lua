-- Finds which of these runs are in one of these states; a record that cannot be read is among them. Changes nothing. Returns run ids
local wanted, found = {}, {}
for _, state in ipairs(states) do wanted[state] = true end
for _, id in ipairs(ids) do
  local state = redis.pcall('HGET', k.run(id), 'state')
  if type(state) == 'table' or wanted[state] then found[#found + 1] = id end
end
return found
