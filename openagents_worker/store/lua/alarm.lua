-- A worker whose lease was ended early says that it is alive: its runs' recoveries go down again. Said twice it counts once.
-- What was held against the runs for it is taken back when the process registers anew.
-- The third false alarm within an hour switches that way of ending leases off for an hour.
-- Returns FALSE_ALARM, runs, `process` | `connection`, whether it is off now | NONE. Event worker.false_alarm of each run that has not ended.
--#include run
--#include early
local HOUR_MS, TOO_MANY = 3600000, 3
local by = redis.call('HGET', k.gone(incarnation), '')
if not by or by == FALSE_ALARM then return {'NONE'} end
redis.call('PERSIST', k.workers()) -- changes nothing, but a full Redis takes it, and then the rest of the script
local taken = redis.call('HGETALL', k.gone(incarnation))
redis.call('HSET', k.gone(incarnation), '', FALSE_ALARM) -- what reclaim takes from now on it does not count
local runs = 0
for i = 1, #taken, 2 do
  local run = taken[i] ~= '' and load(taken[i])
  if run and run.life == tonumber(taken[i + 1]) then
    runs = runs + 1
    redis.call('HSET', k.run(run.id), 'recoveries', digits(math.max(run.recoveries - 1, 0)))
    if not TERMINAL[run.state] then append(run, {'worker.false_alarm', '{"alive":' .. q(incarnation) .. ',"seen_by":' .. q(by) .. '}'}) end
  end
end
local alarms = k.false_alarms(by)
redis.call('ZADD', alarms, digits(NOW_MS), incarnation)
redis.call('ZREMRANGEBYSCORE', alarms, '-inf', digits(NOW_MS - HOUR_MS))
redis.call('PEXPIRE', alarms, HOUR_MS)
local off = redis.call('ZCARD', alarms) >= TOO_MANY
if off then redis.call('SET', k.looks_off(by), '1', 'PX', HOUR_MS) end
return {'FALSE_ALARM', runs, by, off and 1 or 0}
