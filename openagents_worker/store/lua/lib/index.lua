--#include time
-- Lists of runs and of sessions, for who looks for them. Written in the script that makes what they list.
local SESSIONS = 'sessions' -- the list of sessions; all others list runs
local LOOKED_AT = 2 -- entries of a list each time one comes in: it shrinks while it is written if more than half of them are gone

local function ttl_ms_of(name) return name == SESSIONS and SESSION_TTL_MS or RUN_TTL_MS end

-- is_gone(name, id): whether the record has expired for which this entry stands in that list
local function is_gone(name, id) return redis.call('EXISTS', name == SESSIONS and k.session(id) or k.run(id)) == 0 end

-- take_out_some(name): looks at a few entries that are as old as a record's time to live, and takes out what is gone.
-- The clock's last digits choose which, so that entries which are old and still there keep no others in the list.
local function take_out_some(name)
  local key = k.index(name)
  local old = redis.call('ZCOUNT', key, '-inf', digits(NOW_MS - ttl_ms_of(name)))
  if old == 0 then return end
  local first = NOW_US % math.max(old - LOOKED_AT + 1, 1)
  for _, id in ipairs(redis.call('ZRANGE', key, first, math.min(first + LOOKED_AT, old) - 1)) do
    if is_gone(name, id) then redis.call('ZREM', key, id) end
  end
end

local function list_in(name, id)
  redis.call('ZADD', k.index(name), digits(NOW_MS), id)
  redis.call('ZADD', k.indexes(), 'NX', digits(NOW_MS + ttl_ms_of(name)), name)
  take_out_some(name)
end

-- lists_of(run, more): the lists that a run is in; `more` are those of its tenant and labels
local function lists_of(run, more)
  local lists = {'all', 'agent=' .. run.agent, 'session=' .. run.session}
  for _, name in ipairs(more) do lists[#lists + 1] = name end
  return lists
end
