-- pending(stream, group, stream id) -> whether a worker holds it, also where the entry was deleted under its hands: it may finish it yet.
local function pending(stream, group, sid)
  return #redis.pcall('XPENDING', stream, group, sid, sid, 1) > 0         -- no such group: nobody holds anything
end
-- standing(stream, group, due) -> function(stream id, email_id) -> unread | flight | waiting | lost, of an entry that is in the stream.
-- Up to the group's last-delivered id everything was delivered, and no transition leaves such an entry neither pending nor due: then
-- someone else took it out of the pending list (XACK, XGROUP DELCONSUMER), and no worker would ever see it again.
local function standing(stream, group, due)
  local last_ms, last_seq = 0, 0                  -- no group yet: it will begin at the first entry
  if redis.call('EXISTS', stream) == 1 then
    for _, row in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      local found = {}
      for i = 1, #row, 2 do found[row[i]] = row[i + 1] end
      if found.name == group then last_ms, last_seq = string.match(found['last-delivered-id'], '^(%d+)-(%d+)$') end
    end
  end
  last_ms, last_seq = tonumber(last_ms), tonumber(last_seq)
  return function(sid, email_id)
    local ms, seq = string.match(sid, '^(%d+)-(%d+)$')
    ms, seq = tonumber(ms), tonumber(seq)
    if ms > last_ms or (ms == last_ms and seq > last_seq) then return 'unread' end
    if redis.call('ZSCORE', due, sid .. '|' .. email_id) then return 'waiting' end
    return pending(stream, group, sid) and 'flight' or 'lost'
  end
end
