-- Finds which of these runs are in one of these states; a record that cannot be read is among them. `with_codes`: also the code of the error
-- with which each has ended, or for which it is retried; '?' if the record does not say it: an earlier version has ended it. Changes nothing.
-- Returns `RunsInStates`.
local wanted, found, codes = {}, {}, {}
for _, state in ipairs(states) do wanted[state] = true end

local function code_of(key, state)
  if type(state) == 'table' then return '?' end
  if state == STATE.retrying then return redis.call('HGET', key, 'last_error') or '' end
  local life, code = string.match(redis.call('HGET', key, 'end_code') or '', '^(%d+) (.+)$')
  return life and life == redis.call('HGET', key, 'life') and code or '?'
end

for _, id in ipairs(ids) do
  local key = k.run(id)
  local state = redis.pcall('HGET', key, 'state')
  if type(state) == 'table' or wanted[state] then
    found[#found + 1] = id
    if with_codes == 1 then codes[#found] = code_of(key, state) end
  end
end
return reply{ids = found, codes = codes}
