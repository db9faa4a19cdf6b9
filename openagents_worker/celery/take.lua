-- Takes up to `most` messages from lists in kombu's format, in the order of the lists. Messages that only notify Celery of the end of a run
-- do not count, because they start nothing; including them, it takes at most `most_in_all`.
-- A message that is not a wake-up is stored as unacknowledged, as kombu does, but in the same script, so that it cannot be lost in between.
-- KEYS: kombu's hash of unacknowledged messages, its index, the lists. ARGV: most, now (seconds), most_in_all.
-- Returns a flat array: list, message, delivery tag if it was stored as unacknowledged else '', list, message, tag …
local unacked, index, left, now, left_in_all = KEYS[1], KEYS[2], tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])

local function note(item)
  local message = cjson.decode(item)
  local properties = message.properties
  local tag, where = properties.delivery_tag, properties.delivery_info
  if type(tag) ~= 'string' or type(message.body) ~= 'string' then return '' end
  redis.call('ZADD', index, now, tag)
  redis.call('HSET', unacked, tag, '[' .. item .. ',' .. cjson.encode(where.exchange) .. ',' .. cjson.encode(where.routing_key) .. ']')
  return tag
end

local taken = {}
for i = 3, #KEYS do
  local items
  repeat
    local count = math.min(left, left_in_all)
    items = count > 0 and redis.pcall('RPOP', KEYS[i], count) or {}
    items = items.err and {} or items -- the next blocking read handles a key that is not a list
    for _, item in ipairs(items) do
      taken[#taken + 1] = KEYS[i]
      taken[#taken + 1] = item
      local ok, tag
      if not string.find(item, '"wake_us"', 1, true) then ok, tag = pcall(note, item) end -- the transport puts an invalid message aside
      taken[#taken + 1] = ok and tag or ''
      left_in_all = left_in_all - 1
      if not string.find(item, '"run_ended"', 1, true) then left = left - 1 end
    end
  until #items == 0
end
return taken
