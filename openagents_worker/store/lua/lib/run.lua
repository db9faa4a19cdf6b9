--#include time
-- A run's record and its events. Whoever changes the state writes the event, in the same script.
local RUN_FIELDS = {'state', 'fence', 'owner', 'attempt', 'life', 'agent', 'session', 'queue', 'cancel', 'steps', 'canvas', 'tell', 'expires',
  'retries', 'recoveries', 'stuck', 'durable', 'usage', 'emit_no', 'due', 'uid', 'started', 'claimed', 'cancel_reason'}

-- load(R): the record as a table, numbers as numbers; nil when there is none
local function load(R)
  local values = redis.call('HMGET', k.run(R), unpack(RUN_FIELDS))
  if not values[1] then return nil end
  local run = {id = R}
  for i, name in ipairs(RUN_FIELDS) do run[name] = values[i] or '' end
  for _, name in ipairs({'attempt', 'life', 'steps', 'retries', 'recoveries', 'stuck', 'emit_no', 'due', 'expires'}) do
    run[name] = tonumber(run[name]) or 0
  end
  return run
end

local TERMINAL = {completed = true, failed = true, cancelled = true}

local function q(text) return cjson.encode(text) end

-- What all envelopes of one moment share: from the run's ids to the beginning of the payload
local function envelope_middle(run)
  return ',"run_id":' .. q(run.id) .. ',"session_id":' .. q(run.session) .. ',"agent_id":' .. q(run.agent)
    .. ',"life":' .. run.life .. ',"attempt":' .. run.attempt .. ',"worker":' .. (run.owner ~= '' and q(run.owner) or 'null')
    .. ',"timestamp":"' .. iso(NOW_MS) .. '","payload":'
end

-- The envelope of an event; `seq` is the JSON of its number (null for what is only live)
local function envelope(name, seq, middle, payload, final)
  return '{"name":' .. q(name) .. ',"seq":' .. seq .. middle .. payload .. (final and ',"final":true}' or '}')
end

-- A reply that is over is told by its event; what was kept of it for those who join has had its use
local function forget_reply(run, payload)
  local call = redis.call('HGET', k.reply(run.id), 'call')
  if call and string.find(payload, '"call":' .. q(call), 1, true) then redis.call('DEL', k.reply(run.id)) end
end

-- append(run, events): events = {name, payload, name, payload, …}; gives each its seq, stores and publishes it
local function append(run, events, final)
  local count = #events / 2
  if count == 0 then return end
  local first = redis.call('HINCRBY', k.run(run.id), 'seq', count) - count
  local stream, channel = k.events(run.id), k.channel(run.agent, run.session, run.id)
  local middle = envelope_middle(run)
  for i = 1, count do
    local seq = digits(first + i)
    local name, payload = events[2 * i - 1], events[2 * i]
    if name == 'llm.succeeded' or name == 'llm.failed' then forget_reply(run, payload) end
    local text = envelope(name, seq, middle, payload, final and i == count)
    redis.call('XADD', stream, 'MAXLEN', '~', EVENTS_MAXLEN, seq .. '-0', 'e', text)
    redis.call('PUBLISH', channel, text)
  end
end

-- The next fence for a run whose owner changes: the token goes up, the nonce is the claimer's or empty
local function next_fence(run, nonce)
  local token = tonumber(string.match(run.fence, '^(%d+):')) or 0
  return digits(token + 1) .. ':' .. (nonce or '')
end

-- live(R, F): the record when this fence may write, else nil
local function live(R, F)
  local run = load(R)
  if not run or run.fence ~= F or run.state ~= 'running' then return nil end
  if redis.call('HGET', k.session(run.session), 'holder') ~= R then return nil end
  return run
end

-- What a wake-up message needs: {run, queue, wake_us, agent, session, attempt, step, canvas}
local function wake_of(run)
  redis.call('ZADD', k.sent(run.queue), digits(NOW_US), run.id)
  return {run.id, run.queue, digits(NOW_US), run.agent, run.session, digits(run.attempt), digits(run.steps), run.canvas}
end

-- leave(run): no longer in its owner's lists; the time it was worked on is added up
local function leave(run)
  if run.owner == '' then return end
  redis.call('HINCRBY', k.run(run.id), 'active_ms', math.max(0, NOW_MS - (tonumber(run.claimed) or NOW_MS)))
  redis.call('SREM', k.worker_runs(run.owner), run.id)
  redis.call('SREM', k.worker_box(run.owner), run.id)
  if redis.call('GET', k.worker_suspect(run.owner)) == run.id then redis.call('DEL', k.worker_suspect(run.owner)) end
end
