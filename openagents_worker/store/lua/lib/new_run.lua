--#include run
--#include index
-- The birth of a run: the only code that creates the record of one.
local OWN_FIELDS = {'format', 'state', 'queue', 'agent', 'session', 'parent', 'digest', 'uid', 'request', 'input_digest', 'canvas', 'tell', 'durable', 'expires', 'lists', 'on_busy', 'forked_from', 'seeds',
  'parent_call', 'parent_life', 'mode', 'background'}

-- new_run(R, own, indexes): creates the record of a run, adds it to the indexes, and returns it. `own` are the fields in which runs differ, by
-- name (OWN_FIELDS); a field without a value is not stored. The caller has checked that there is no record, and writes the first event.
local function new_run(R, own, indexes)
  local fields = {'fence', '0:', 'owner', '', 'attempt', 0, 'life', 1, 'seq', 0, 'emit_no', 0, 'steps', 0, 'retries', 0, 'recoveries', 0,
    'stuck', 0, 'created', digits(NOW_MS)}
  for _, name in ipairs(OWN_FIELDS) do
    if own[name] then
      fields[#fields + 1] = name
      fields[#fields + 1] = own[name]
    end
  end
  redis.call('HSET', k.run(R), unpack(fields))
  redis.call('DEL', k.message_ids(R)) -- of an earlier run with this id
  redis.call('ZREM', k.index(APPROVALS), R) -- of one whose record is lost, and that waited for an approval
  for _, name in ipairs(indexes) do list_in(name, R) end
  return load(R)
end
